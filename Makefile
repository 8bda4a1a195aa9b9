# Three commands: `make demo`, `make test` and `make docs`. Each makes .venv first when it is missing or stale, from the releases in
# constraints.txt. `make lock` renews that file; `make test-newest` runs the tests with the newest releases, in .venv-newest;
# `make test-vllm VLLM_VERSION=0.33.0` those of the plugin against a release of vLLM, in .venv-vllm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
TEST_JOBS ?= 2
# Not the newest, which may be a build of gigabytes: what the lock has, unless asked for by NEWEST_TORCH=torch.
NEWEST_TORCH ?= $(shell grep -o '^torch==[0-9.]*' constraints.txt)
OLDEST_TORCH ?= $(NEWEST_TORCH)
VLLM_VERSION ?= 0.33.0

.PHONY: demo test docs pictures test-newest test-oldest test-vllm lock check clean

demo: $(VENV)/.installed
	$(BIN)/python -m turboquant_vllm.demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# The site, into site/, its tours executed; any warning is an error. TOURS=0 leaves tours as they are.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --quiet --strict

pictures: $(VENV)/.installed
	$(BIN)/python docs/pictures/pictures.py --write

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and exact, so that no other package's range picks another build of it. Without build isolation, since only then
# are what builds packages and the rest of one lock.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) --constraint constraints.txt torch setuptools
	$(BIN)/python $(PIP) --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@

# New each time: what was newest last week is not what is asked for.
test-newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP) "$(NEWEST_TORCH)"
	$(VENV)-newest/bin/python $(PIP) --editable ".[dev]"
	$(VENV)-newest/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# The lowest releases that pyproject.toml allows, all at once; torch as in the lock, unless asked for by OLDEST_TORCH=torch==2.8.0.
test-oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP) "uv>=0.8" "$(OLDEST_TORCH)"
	echo "$(OLDEST_TORCH)" > $(VENV)-oldest/torch.txt
	$(VENV)-oldest/bin/uv pip compile pyproject.toml --extra dev --resolution lowest-direct --quiet --no-annotate \
		--constraint $(VENV)-oldest/torch.txt --output-file $(VENV)-oldest/lowest.txt
	$(VENV)-oldest/bin/python $(PIP) --constraint $(VENV)-oldest/lowest.txt --editable ".[dev]"
	$(VENV)-oldest/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# vLLM's Python code is all that these tests need: no GPU, and none of its requirements that are for one. Tests of its engine skip
# themselves; were a requirement missing, all others would, too: hence the line that imports what they import.
test-vllm:
	$(PYTHON) -m venv --clear $(VENV)-vllm
	$(VENV)-vllm/bin/python $(PIP) --constraint constraints.txt torch setuptools
	$(VENV)-vllm/bin/python $(PIP) --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	$(VENV)-vllm/bin/python $(PIP) --constraint constraints.txt --requirement tests/vllm-requirements.txt
	$(VENV)-vllm/bin/python $(PIP) --no-deps "vllm==$(VLLM_VERSION)"
	$(VENV)-vllm/bin/python -c "import vllm.model_executor.layers.attention, vllm.v1.attention.backend"
	$(VENV)-vllm/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal -m vllm $(PYTEST_ARGS) tests/test_vllm_*.py

# torch's own requirements are those of its build for CUDA, which a build for CPUs
# shares or lacks, so that both take this file.
lock:
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python $(PIP) "uv>=0.8"
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra dev --universal --upgrade --quiet --annotation-style line \
		--custom-compile-command "make lock" --output-file constraints.txt

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest $(VENV)-vllm $(VENV)-lock demo-out site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
