# From nothing: `make demo` and `make test`, in either order. Both need only Python 3.11-3.13 and make.
#   PYTHON=python3.12 make test      another interpreter (for a new .venv)
#   WORKERS=4 make test              more test processes
#   make test TESTS=tests/msdiffusion/request/test_layout.py

PYTHON ?= python3
WORKERS ?= 2
TESTS ?= tests
FUZZ_SECONDS ?= 60
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread per process: the suite runs WORKERS processes, and OpenMP threads that wait for each other cost more than they bring.
test: export OMP_NUM_THREADS = 1
# Nothing here may need a download: a forgotten one fails at once instead of waiting for a network.
test demo: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-processors test-oldest lint docs bench release clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## mine, fine-tune, generate and score, all on this machine: out/demo/index.html
	$(BIN)/msdiffusion demo --out out/demo

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# PROCESSORS=smallest plays one of them, see benchmarks/processors.py.
test-processors: $(INSTALLED)  ## the exact tests as other processors would run them (ten minutes)
	$(BIN)/python benchmarks/processors.py $(PROCESSORS)

# What setup.cfg allows at least; the rest, which no one here chooses, as new as it goes with that. OLDEST: which tests.
OLDEST ?= tests
test-oldest: export OMP_NUM_THREADS = 1
test-oldest: export HF_HUB_OFFLINE = 1
test-oldest: $(INSTALLED)  ## the tests on the oldest versions that setup.cfg allows, in .venv-oldest (3 GB of downloads)
	$(BIN)/uv venv --seed --allow-existing --python $(BIN)/python .venv-oldest
	HF_HUB_OFFLINE=0 $(BIN)/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct \
	  --override overrides.txt --editable ".[all,test]" "opencv-python-headless>=4.11"
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(OLDEST)

lint: $(INSTALLED)  ## ruff, on everything
	$(BIN)/ruff check .

docs: $(INSTALLED)  ## draw the pictures of docs/, then check every link and every file a command names
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/inference_pictures.py
	$(BIN)/python -m pytest tests/test_repository.py -k "docs or readme"

# These measure on clips of the kind that is to be mined.
ON_VIDEOS := decoding shots similarity mining_cost
bench: $(INSTALLED)  ## every figure of docs/benchmarks.md, one after the other; those on real clips with VIDEOS=DIR
	@set -e; for script in $(filter-out $(ON_VIDEOS:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script; done
	@test -n "$(VIDEOS)" || echo "left out, because they need real clips (make bench VIDEOS=DIR): $(ON_VIDEOS)"
	@set -e; for name in $(if $(VIDEOS),$(ON_VIDEOS)); do \
	  echo "== benchmarks/$$name.py"; OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py --videos "$(VIDEOS)"; done

fuzz: $(INSTALLED)  ## damaged files for every reader of ours, FUZZ_SECONDS each: twenty minutes
	FUZZ_SECONDS=$(FUZZ_SECONDS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -k damaged

release:  ## sdist and wheel in dist/, checked as they would be uploaded
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/python -m twine check --strict dist/*
	@test $$(cat dist/*.whl | wc -c) -lt 100000000 || { echo "the wheel has more than 100 MB"; exit 1; }

clean:  ## remove what make made, environments included
	rm -rf $(VENV) .venv-oldest .venv-release out runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage htmlcov

# setup.cfg says what is needed, constraints.txt in which version, overrides.txt what is left out.
$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "msdiffusion needs Python 3.11 to 3.13, but $(PYTHON) is not one of them: give another one, PYTHON=python3.12 make ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt \
	  --override overrides.txt --compile-bytecode --editable ".[all,test]" opencv-python-headless
	@touch $@
