# `make notebook` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: help install notebook test campaign lint bench format clean

help:
	@echo "make notebook   train a model and tell stories: the notebook, top to bottom, into run/"
	@echo "make test       check the style, the types and everything else"
	@echo "make campaign   cut runs off, damage files and so on, hundreds of times more than make test does (some 20 minutes)"
	@echo "make bench      time each stage against its peer, as far as a CPU can (minutes); SOURCE=... for real stories"
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

# Stories for the tokenizing benchmark: built in, unless SOURCE names a file, a folder or a dataset on the hub.
SOURCE := builtin
TOKENIZER := gpt2

bench: $(INSTALLED)
	$(BIN)/python benchmarks/tokenizing.py --source $(SOURCE) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/windows.py
	$(BIN)/python benchmarks/products.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/training_step.py --recipe demo
	$(BIN)/python benchmarks/telling.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/memory.py --device cpu

test: lint
	$(BIN)/python -m pytest

campaign: $(INSTALLED)
	$(BIN)/python -m pytest -m campaign --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv run *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
