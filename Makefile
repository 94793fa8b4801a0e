# make train      make the environment and train configs/debug_cpu.toml on two processes of this machine
# make test       make the environment; lint, format check, type check, tests
# make test-all   the same, with the whole of each matrix that `make test` runs a sample of: hours on two cores
# make test-gpu   the tests marked gpu, with the Python that is there (no environment is made)
# make clean      remove the environment, caches and runs
#
# PYTHON is the interpreter (3.11 or newer) that the environment is made from, VENV where it goes.
PYTHON ?= python3
VENV ?= .venv
# Test processes side by side; each file's tests stay together.
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The newest release of Triton (`pip index versions triton`). Tests compile every kernel with it too, beside the one that
# .constraints.txt pins and the tiles are tuned for. This line is the only place that names it.
TRITON_NEWEST := 3.9.0
NEWEST := .cache/triton-$(TRITON_NEWEST)
# One thread a process: the tests and the training example start several.
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-all test-gpu clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "longctx needs Python 3.11 or newer and $(PYTHON) is older: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c .constraints.txt -e '.[test]'
	@touch $@

train: $(STAMP)
	$(BIN)/torchrun --standalone --nproc-per-node 2 train.py --config configs/debug_cpu.toml

# Without a network the tests with it are skipped, except in continuous integration.
$(NEWEST): | $(STAMP)
	@rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$(TRITON_NEWEST) && mv $@.part $@ || \
	  { rm -rf $@.part; echo "triton $(TRITON_NEWEST) could not be installed: kernels are not compiled with it" >&2; test -z "$$CI"; }

test: CHOSEN := not slow
test-all: CHOSEN := slow or not slow
test test-all: $(STAMP) $(NEWEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "$(CHOSEN)"

# Without a network and without the package installed: the current directory is on the path.
test-gpu:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -m "gpu or gpu2"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache runs wandb
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
