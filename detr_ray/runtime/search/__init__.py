"""Searches through Ray Tune."""
