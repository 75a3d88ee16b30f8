"""Evaluating models: beside training, and on its own."""
