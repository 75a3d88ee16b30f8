"""The folder of a run: its record, its lock, its checkpoints, and saving and restoring the training state."""
