# Every target works alone on a fresh clone: it makes the virtual environment that it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Where there is no GPU: make demo PIP_EXTRA="--extra-index-url <the index of torch's CPU builds>" saves gigabytes.
PIP_EXTRA ?=
# Tests start many processes: each would compile all that it imports anew, where somebody has told Python so.
KEEP = PYTHONDONTWRITEBYTECODE=
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_EXTRA)

.PHONY: demo test matrix lint docs bench clean

demo: $(VENV)/.run
	$(BIN)/python -m lightning_efficient.demos.compare --steps 280

test: $(VENV)/.dev $(VENV)/oldest $(VENV)/models
	OLDEST_LIGHTNING=$(VENV)/oldest MODELS=$(VENV)/models $(KEEP) $(BIN)/python -m pytest -n 3 --dist worksteal

matrix: $(VENV)/.dev  # what goes together, all of it: half an hour to two hours on two cores; it goes on where it was stopped
	$(BIN)/python -m tests.matrix

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks growth
	$(BIN)/python -m benchmarks checkpoint
	$(BIN)/python -m benchmarks activation
	$(BIN)/python -m benchmarks offload
	$(BIN)/python -m benchmarks precision
	$(BIN)/python -m benchmarks together
	$(BIN)/python -m benchmarks soak

clean:
	rm -rf $(VENV) site runs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .[cli]
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .[dev]
	@touch $@

# Beside the environment, not in it; where there is no index, what runs with it is skipped.
$(VENV)/oldest: $(VENV)/bin/python constraints-oldest.txt
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		-r constraints-oldest.txt && touch $@

# Models that users bring. In the environment they would make each process of the tests seconds slower.
$(VENV)/models: $(VENV)/bin/python pyproject.toml constraints.txt
	-$(PIP) --upgrade --no-compile --target $@ "transformers>=5" && touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .[cli,docs]
	@touch $@

$(VENV)/.bench: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .[cli,bench]
	@touch $@
