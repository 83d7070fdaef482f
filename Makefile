# `make check` is what a change must pass.
PYTHON ?= python

.PHONY: check format lint types test docs

check: lint types test docs

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs:
	$(PYTHON) -m kdx.reference --check docs
