# Everything happens in .venv; it is made once and made again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
DEMO_ARGS ?=

.PHONY: setup demo test check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch first and together with torchvision, so that their builds match
	$(VENV)/bin/pip install --quiet torch torchvision
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(VENV)/bin/python -m flows.demo $(DEMO_ARGS)

test: setup check
	$(VENV)/bin/pytest

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo-out
