"""Data sets: index, plan of the training stream, and loading of padded batches."""
