"""Searches over settings: the space, the trials, and what a search shows in the end. Starts nothing itself."""

from detr_ray.search.distributions import Distribution
from detr_ray.search.space import SearchSpace
from detr_ray.search.trials import Trial, read_trials, write_trials

__all__ = ["Distribution", "SearchSpace", "Trial", "read_trials", "write_trials"]
