"""One optimizer step of a worker, and its parts: optimizer, single parameters, averages, non-finite numbers."""
