# Set-up, the main job and the checks. `make help` lists them.
PYTHON ?= python3
# Any torch >= 2.10 will do: make test TORCH=torch takes the newest.
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help setup distill test bench lint format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make distill  a teacher teaches students on real images: table and figure in outputs/"
	@echo "make test     set-up and all tests"
	@echo "make bench    fastkd beside eager PyTorch and torch.compile: table, JSON in bench/results/"
	@echo "make lint     ruff and clang-format, nothing is changed"
	@echo "make format   the same, changing files"
	@echo "make wheel    a wheel in dist/"
	@echo "make setup    the virtual environment $(VENV) with fastkd in it, as the others make it"
	@echo "make clean    removes what was built, $(VENV) too"
	@echo "PYTHON=python3.12 and TORCH=torch==2.11.0 choose others than $(PYTHON) and $(TORCH)."

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python >= 3.10 wanted, $(PYTHON) is older"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch: $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23" "setuptools>=77" "cmake>=3.20" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@touch $@

$(VENV)/ready: $(VENV)/torch setup.py pyproject.toml CMakeLists.txt $(SOURCES)
	FASTKD_TESTING=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,examples,bench]"
	@touch $@

setup: $(VENV)/ready

distill: $(VENV)/ready
	$(BIN)/python examples/distill_digits.py $(ARGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/ready
	$(BIN)/python -m bench $(ARGS)

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

wheel: $(VENV)/torch
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:
	rm -rf $(VENV) build dist outputs fastkd/lib fastkd.egg-info
