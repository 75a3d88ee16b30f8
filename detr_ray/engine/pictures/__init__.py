"""Pictures of data, models, evaluations and runs: from a configuration to a figure with the numbers beside it."""
