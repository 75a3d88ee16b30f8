# `make` lists what there is. Every target sets up what it needs.
# `make test-gpu PYTEST="python -m pytest"` takes the Python that is there instead: torch, torchvision, scipy, numpy,
# pydantic, PyYAML, Pillow and pytest are enough for it.
PYTHON ?= python3
VENV ?= .venv
TESTS_AT_ONCE ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install quickstart cluster-up cluster-down test test-slow mutants check check-types check-style format lock bench profile clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "detr_ray needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@# pip would compile on one core, and tests too. A file for another version of Python is no fault, as for pip.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib detr_ray || true
	touch $@

install: $(READY)  ## create the environment in .venv (about 3 minutes, 6 GB)

quickstart: $(READY)  ## train a small detector on generated images, on two workers (about 10 minutes on 2 cores)
	$(BIN)/python -m detr_ray.train --config configs/quickstart.yaml

cluster-up: $(READY)  ## start a real Ray cluster of three nodes on this machine, to submit jobs to
	$(BIN)/python cluster/local.py up

cluster-down: $(READY)  ## end that cluster
	$(BIN)/python cluster/local.py down

test: $(READY)  ## run the tests, two at a time (minutes); one: .venv/bin/python -m pytest FILE
	$(BIN)/python -m pytest --numprocesses $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## run the proofs that take long: killed processes, real images learnt by heart
	$(BIN)/python -m pytest -m slow

mutants: $(READY)  ## change lines one at a time and say which changes no test notices (an hour); some: python -m tests.mutants --help
	$(BIN)/python -m tests.mutants

test-gpu: $(if $(PYTEST),,$(READY))  ## run the tests that need a GPU; skipped, saying so, where there is none
	$(or $(PYTEST),$(BIN)/python -m pytest) -m gpu -rs tests/gpu

check: check-types check-style  ## lint, types, spelling and import rules; at the same time: make -j check

check-types: $(READY)
	$(BIN)/mypy

check-style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell detr_ray tests configs cluster docs README.md CHANGELOG.md CONTRIBUTING.md

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## resolve the newest allowed versions into requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet '.[dev,tune,export]' setuptools
	build/lock/bin/pip freeze --all --exclude detr_ray --exclude pip \
		| sed -E '/^(nvidia-|triton|cuda-)/ s/$$/ ; sys_platform == "linux"/' > requirements.lock
	rm -rf build/lock

bench: $(READY)  ## measure this machine against a plain implementation (about 15 minutes); one: python -m benchmarks NAME
	$(BIN)/python -m benchmarks

profile: $(READY)  ## show where a training step's time goes: phases, parts of the model, operators
	$(BIN)/python -m benchmarks.profiling

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
