"""Searches over settings: space, trials, and reports at the end. Does not start trainings itself."""

from detr_ray.search.distributions import Distribution
from detr_ray.search.space import SearchSpace
from detr_ray.search.trials import Trial, read_trials, write_trials

__all__ = ["Distribution", "SearchSpace", "Trial", "read_trials", "write_trials"]
