"""The training loop and everything around it that does not know of Ray or MLflow."""
