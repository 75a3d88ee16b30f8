"""A detector as a service of Ray Serve."""
