# Two commands on a fresh machine with git, make and Python >= 3.11:
#   make demo    sets up .venv, runs the main job on embedded data, says where the report is
#   make test    sets up .venv, runs the fast tests
# The first Python that is new enough; make PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per process: two test processes with two threads each are slower than this on two cores.
PYTEST := OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-all lint format examples benchmarks bench docs lock clean

help:
	@echo "make demo      set up, compare four algorithms on the crabs, say where the report is"
	@echo "make test      set up, run the fast tests and the examples in the docstrings"
	@echo "make test-all  the slow tests too"
	@echo "make lint      ruff, import-linter and mypy;  make format  lets ruff fix what it can"
	@echo "make examples  every file of examples/, shortened"
	@echo "make benchmarks  the long benchmarks at a few steps each; writes no results"
	@echo "make bench     every timed comparison with other libraries, in an environment of its own: half an hour, idle machine"
	@echo "make docs      the site, into docs/_build/html: every code cell and every example is run"
	@echo "make lock      resolve requirements.lock again"
	@echo "make clean     remove .venv and caches"

setup: $(READY)

# uv installs the pinned set in a fraction of pip's time, and takes torch and torchvision as one pair.
$(READY): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	$(BIN)/uv pip install --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	$(BIN)/ppl-gen demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST) --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Two at a time, each in a folder of its own; what an example prints is shown where it fails.
examples: $(READY)
	@ls $(CURDIR)/examples/*.py | OMP_NUM_THREADS=1 PPL_GEN_QUICK=1 MPLBACKEND=Agg xargs -P 2 -I {} sh -c ' \
		folder=$$(mktemp -d); cd "$$folder"; \
		if $(CURDIR)/$(BIN)/python {} > output.txt 2>&1; then echo "ran {}"; rm -rf "$$folder"; \
		else echo "FAILED {}"; cat output.txt; rm -rf "$$folder"; exit 1; fi'

# Long benchmarks at a few steps each, two at a time, with partial results in a folder of their own. Those on MNIST want
# its images; set PPL_GEN_DATA.
LONG := characters flows_patches modes $(if $(PPL_GEN_DATA),gans image_flows mnist_vae semi_supervised energies)
benchmarks: $(READY)
	@printf '%s\n' $(LONG) | OMP_NUM_THREADS=1 MPLBACKEND=Agg xargs -P 2 -I {} sh -c ' \
		PPL_GEN_WORK=$$(mktemp -d); export PPL_GEN_WORK; \
		if $(BIN)/python benchmarks/{}.py --quick > "$$PPL_GEN_WORK/output.txt" 2>&1; then echo "ran {} --quick"; \
		else echo "FAILED {}"; cat "$$PPL_GEN_WORK/output.txt"; exit 1; fi; rm -rf "$$PPL_GEN_WORK"'

# The libraries that are compared with want packages that nobody else does (JAX, PyTensor): an environment of their own,
# with the pins of the lock.
$(VENV)-bench/.ready: $(READY)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(VENV)-bench
	$(BIN)/uv pip install --quiet --python $(VENV)-bench/bin/python --requirement requirements.lock
	$(BIN)/uv pip install --quiet --python $(VENV)-bench/bin/python --constraint requirements.lock --group bench
	$(BIN)/uv pip install --quiet --python $(VENV)-bench/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

bench: $(VENV)-bench/.ready
	$(VENV)-bench/bin/python benchmarks/bench.py

# The packages of the site are no part of the set-up; a resolved lock keeps them from moving anything else. Pages that are
# generated from the code are generated again, so that none outlives the name it describes.
$(VENV)/.docs: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --group docs
	@touch $@

docs: $(VENV)/.docs
	rm -rf docs/_build docs/api docs/gallery docs/results
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -j 2 -q docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

# No index and no path is written down, so the same pins install from any mirror. 3.11 is the oldest Python: the
# markers in the file choose for the newer ones.
lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra all --group dev --upgrade \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-bench .mypy_cache .pytest_cache .ruff_cache dist
