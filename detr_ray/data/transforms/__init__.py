"""Augmentations beyond the original's. Each decides from random numbers what is done to a sample.

Each is a `Transform`: it decides from numbers in [0, 1) and the sizes of a window's images, before a pixel is read, and
gives steps for the plan of each sample. `TransformSequence` is a list of them, applied one after the other.
"""
