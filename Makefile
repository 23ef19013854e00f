# `make notebook` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help install notebook test lint format clean

help:
	@echo "make notebook   train a model and tell stories: the notebook, top to bottom, into run/"
	@echo "make test       check the style, the types and everything else"
	@echo "make format     put the code into the house's format"
	@echo "make clean      remove .venv and what the tools left (data and checkpoints stay)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[notebook,test]' -c constraints.txt
	touch $(INSTALLED)

notebook: $(INSTALLED)
	$(BIN)/python tests/run_notebook.py StoryLLM.ipynb run

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv run *.egg-info .pytest_cache .mypy_cache .ruff_cache
