# SPDX-License-Identifier: Apache-2.0
# Everything from a fresh clone. Each target sets up what it needs, once: system packages (as root on Debian; otherwise it
# says what to install), an environment in .venv, and the compiled library. The system's Python is left alone.

PYTHON ?= python3
# What to install as torch. Another index or build: make demo PIP_TORCH_FLAGS="--index-url ..."
TORCH ?= torch==2.13.0
PIP_TORCH_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
BUILD := build/python

NATIVE_SOURCES := $(shell find include src cmake -type f) CMakeLists.txt pyproject.toml
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh')
CMAKE_FILES = $(shell git ls-files --cached --others --exclude-standard '*CMakeLists.txt' '*.cmake')

.PHONY: help demo test test-cpp test-python gpu-test lint format bench sanitize clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      generate with the bundled video model, dense against fine-tuned SLA2; results in outputs/demo"
	@echo "make test      all tests that need no GPU: C++ (ctest), then Python (pytest)"
	@echo "make gpu-test  the tests that need a CUDA device; says so and does nothing without one"
	@echo "make lint      formatting, lint and types, as CI checks them (make format mends the first)"
	@echo "make sanitize  the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench     the CPU benchmarks; appends to bench/results and renders docs/performance.md"
	@echo "make clean     remove the environment and everything that was built"

# --- environment -----------------------------------------------------------------------------------------------------
# Stamps: an environment is made once, and completed when pyproject.toml or the native sources change.

$(VENV)/.torch: tools/system_packages.sh
	@tools/system_packages.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "sparline needs Python 3.10 or later; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) into $(VENV)"
	@$(PIP) $(PIP_TORCH_FLAGS) "$(TORCH)"
	@touch $@

# The pinned torch is named again, so that no dependency brings another one.
define install
	@echo "Building sparline and installing it into $(VENV) with its $(1) dependencies"
	@$(PIP) "scikit-build-core>=0.11" ninja
	@$(PIP) --no-build-isolation --editable ".[$(1)]" "$(TORCH)"
	@touch $@
endef

$(VENV)/.demo: $(VENV)/.torch $(NATIVE_SOURCES)
	$(call install,demo)

$(VENV)/.test: $(VENV)/.torch $(NATIVE_SOURCES)
	@tools/system_packages.sh chromium
	$(call install,demo$(comma)test)
	@touch $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.torch $(NATIVE_SOURCES)
	@tools/system_packages.sh chromium
	$(call install,demo$(comma)dev)
	@touch $(VENV)/.demo $(VENV)/.test

comma := ,

# --- the main job ----------------------------------------------------------------------------------------------------

# The bundled model as it was trained, with torch's attention, and fine-tuned with SLA2 at 95 and 97 % sparsity.
DEMO_METHODS := original,sla2-95,sla2-97
DEMO_CLIP := python/sparline/demo/assets/held_out.mp4

demo: $(VENV)/.demo
	@echo; echo "1/2  From noise"
	@$(BIN)/sparline generate --compare $(DEMO_METHODS) --steps 8 --out outputs/demo/noise
	@echo; echo "2/2  Over a real clip that training never saw"
	@$(BIN)/sparline generate --compare $(DEMO_METHODS) --prompt bigbuckbunny \
	  --init-video $(DEMO_CLIP) --strength 0.6 --steps 12 --guidance 1 --out outputs/demo/clip
	@echo; echo "Look at outputs/demo/noise/sheet.png and outputs/demo/clip/sheet.png; compare.mp4 beside them moves."
	@echo "How close the fine-tuned models are to dense over held-out clips: docs/quality.md (SLA2, cubes, blocks of 64 x 32)."

# --- tests -----------------------------------------------------------------------------------------------------------

test: test-cpp test-python

test-cpp: $(VENV)/.test
	@cmake -S . -B $(BUILD) -DSPARLINE_BUILD_TESTS=ON -DSPARLINE_BUILD_TORCH=ON >/dev/null
	@cmake --build $(BUILD)
	@ctest --test-dir $(BUILD) --output-on-failure

test-python: $(VENV)/.test | test-cpp
	@$(BIN)/python -m pytest -m "not gpu"

# Loud where it cannot run: a silent success would look like a pass.
gpu-test: $(VENV)/.test
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python tests/python/gpu/run.py; \
	else \
	  echo "gpu-test: SKIPPED: $(TORCH) in $(VENV) finds no CUDA device. Nothing was tested." >&2; \
	fi

sanitize:
	@tools/system_packages.sh
	@cmake --preset asan
	@cmake --build --preset asan
	@ctest --preset asan

# --- style -----------------------------------------------------------------------------------------------------------

lint: $(VENV)/.dev
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/gersemi --check $(CMAKE_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python bench/report.py --check
	$(BIN)/python tools/method_table.py --check
	$(BIN)/python tools/training_estimate.py --check
	$(BIN)/python examples/experiment/render.py --check

format: $(VENV)/.dev
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/gersemi --in-place $(CMAKE_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- speed -----------------------------------------------------------------------------------------------------------

bench: $(VENV)/.demo
	@$(BIN)/python bench/attention.py --check
	@$(BIN)/python bench/report.py

clean:
	rm -rf $(VENV) build outputs python/sparline/*.so
	find python tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
