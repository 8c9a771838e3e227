# make demo        distil on real digits with wrong labels, with and without influence weights (about a minute)
# make test        the tests
# make test-slow   what takes minutes: fresh installs in every build mode, the whole demo
# make lint        ruff and mypy
# make bench       benchmarks, with ratios measured in one run
# make experiments what weights are worth in training: the missing runs behind docs/results.md, and its tables (20 min)
# make gpu         with a GPU: build, all tests, the sanitizer and GPU benchmarks in 9 minutes (docs/gpu.md)
# make bench-peers influence scores against other libraries, which are put into a folder of their own (long)
#
# Each makes its own virtual environment in .venv the first time. Nothing but python3 (>= 3.10), pip, g++ and make
# need be there. Only `make gpu` takes $(PYTHON) as it is, with the torch, nvcc and pytest that it has, and downloads
# nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Without dependencies: the torchvision that it asks for, and does not import, would replace torch.
BACKPACK ?= backpack-for-pytorch==1.7.1
# It asks for BackPACK, and so for torchvision again.
CURVLINOPS ?= curvlinops-for-pytorch==3.0.1
BIN := $(VENV)/bin
SOURCES := $(shell find csrc build_tools -type f -name '*.[chp]*') setup.py CMakeLists.txt pyproject.toml

.PHONY: demo test test-slow lint bench bench-peers experiments gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/kdaif-fast demo --out runs/demo

# One process a core, each with its own share of the tests; threads that wait for work leave the core to others.
test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks -c benchmarks/pytest.ini --benchmark-json=runs/bench.json

experiments: $(VENV)/.installed-demo
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/run_experiments.py

gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

bench-peers: $(VENV)/.installed-bench $(VENV)-peers/.installed
	$(BIN)/python benchmarks/bench_influence.py --peers $(VENV)-peers

# Without dependencies, and beside the environment: nothing of it can replace torch or numpy.
$(VENV)-peers/.installed: benchmarks/peers.txt $(VENV)/.torch
	$(BIN)/python -m pip install --target $(VENV)-peers --upgrade --no-deps -r benchmarks/peers.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers build runs *.egg-info kdaif_fast/*.so kdaif_fast/_build_report.json

# Debian's python3 has no ensurepip; there virtualenv, fetched into a folder of its own, makes the environment.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "python >= 3.10 is needed; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "==> virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install --target $(VENV)-bootstrap virtualenv && \
	  PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv $(VENV) && rm -rf $(VENV)-bootstrap; }
	touch $@

$(VENV)/.torch: $(VENV)/.created
	@echo "==> $(TORCH) and the build tools"
	$(BIN)/python -m pip install "$(TORCH)" numpy "setuptools>=77" "cmake>=3.26" ninja "pybind11>=3"
	touch $@

# The environment has torch by now, so the kernels are built against it: no isolation, no second torch.
$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	@echo "==> kdaif_fast with its kernels, for $*"
	$(BIN)/python -m pip install --no-build-isolation -e ".[$*]"
	$(if $(filter test bench,$*),$(BIN)/python -m pip install --no-deps "$(BACKPACK)" "$(CURVLINOPS)")
	touch $@
