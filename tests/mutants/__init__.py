"""Changes lines of the project by itself, one at a time, and says which changes no test notices: ``make mutants``."""
