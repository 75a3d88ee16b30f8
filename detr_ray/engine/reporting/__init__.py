"""What a run tells people and MLflow: means of steps, lines of progress, its result."""
