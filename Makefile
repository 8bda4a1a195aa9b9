# Two commands: `make demo` and `make test`. Each makes .venv first when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TEST_JOBS ?= 2

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/python -m turboquant_vllm.demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(PYTEST_ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and exact, so that no other package's range picks another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
