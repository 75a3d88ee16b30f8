"""Augmentations beyond the original's: what is drawn for a sample, and the steps that this makes.

Each is a `Transform`: it decides from numbers in [0, 1) and the sizes of a window's images what happens to each of
them, before a pixel is read. What it decides is in the steps of a sample's plan. `TransformSequence` is a list of them,
one after the other.
"""
