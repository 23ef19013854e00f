# Needs Python 3.11 or newer and nothing else: creates .venv and installs everything into it.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
WORKERS ?= 2

# Stories for the tokenization benchmark: synthetic, or a file, a folder or a Hub dataset.
SOURCE := synthetic
TOKENIZER := gpt2

.PHONY: help install notebook test campaign lint bench format clean

help:
	@echo "make notebook   run the notebook: train a model and generate stories; writes to run/"
	@echo "make test       check formatting, types and spelling, and run the tests"
	@echo "make campaign   run the slow, randomized tests: crashes, faults, corrupted files (about 20 minutes)"
	@echo "make bench      compare each stage with its baseline on a CPU (about 10 minutes); SOURCE=... for real stories"
	@echo "make format     format the code"
	@echo "make clean      remove .venv and tool caches (data and checkpoints stay)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[notebook,test]' -c constraints.txt
	touch $(INSTALLED)

notebook: $(INSTALLED)
	$(BIN)/python tests/run_notebook.py StoryLLM.ipynb run

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

campaign: $(INSTALLED)
	$(BIN)/python -m pytest -m campaign --timeout=3600 --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/tokenization.py --source $(SOURCE) --tokenizer $(TOKENIZER)
	$(BIN)/python benchmarks/windows.py
	$(BIN)/python benchmarks/matmul.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/training_step.py --recipe demo
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/memory.py --device cpu

clean:
	rm -rf .venv run build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
