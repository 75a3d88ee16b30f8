"""Checks of data, weights, storage and tracking before a training run."""
