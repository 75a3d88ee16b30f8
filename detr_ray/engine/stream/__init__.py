"""From the plan to a worker's batches."""
