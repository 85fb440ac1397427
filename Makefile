# Two commands do all set-up: `make demo` and `make test`. Everything lives in .venv; build/ can be deleted at any time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard proto/rhizome/v1/*.proto)
NATIVE := $(shell find radix/native -type f)

.PHONY: install native demo test test-slow check proto wheel-check fallback-check clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

# What the build needs comes first, so that the package is built in place, and a change in C++ compiles what it changes.
# CPU wheels of torch suffice here; where pip would fetch a CUDA build, set PIP_EXTRA_INDEX_URL to a CPU index.
BUILD_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
$(VENV)/.dependencies: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rhizome needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(BUILD_NEEDS)' > $(VENV)/build-needs.txt
	$(BIN)/pip install --quiet cmake ninja --requirement $(VENV)/build-needs.txt
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

BUILD := $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE)
	$(BUILD)
	@$(BIN)/python -c 'import radix; print("radix:", radix.BACKEND, radix.BACKEND_REASON)'
	touch $@

# Without a compiler Rhizome runs on plain Python, but is not tested: this fails, and shows the compiler's words.
native: install
	@$(BIN)/python -c 'import radix._native' 2>/dev/null || $(BUILD) --config-settings wheel.cmake=true

demo: install
	$(BIN)/rhizome demo

test: native check
	RHIZOME_RADIX=native $(BIN)/pytest -m 'not slow' --numprocesses auto --dist worksteal

test-slow: native
	RHIZOME_RADIX=native $(BIN)/pytest -m slow --timeout=3600

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

proto: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

# The sdist, and the wheel that it makes, put into an empty environment (which, without the extra "worker", has no torch).
wheel-check: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && export RHIZOME_RADIX= && \
		venv/bin/python -I ../../tests/support/check_install.py native && venv/bin/rhizome doctor && \
		(venv/bin/rhizome model tiny --out tiny 2>&1 || true) | grep -F "pip install 'rhizome[worker]'"

# The same where nothing can be compiled: no compiler, no cmake, no ninja.
fallback-check:
	rm -rf build/fallback && mkdir -p build/fallback
	$(PYTHON) -m venv build/fallback/venv
	CXX=/bin/false PATH="$(CURDIR)/build/fallback/venv/bin" build/fallback/venv/bin/pip install --quiet \
		--config-settings build-dir=build/fallback/cmake .
	cd build/fallback && export RHIZOME_RADIX= && \
		venv/bin/python -I ../../tests/support/check_install.py reference && venv/bin/rhizome doctor

# The native core's tests under AddressSanitizer, UBSan and ThreadSanitizer. Wants g++.
# Then random operations and bytes, for so many seconds each: build/fuzz keeps what was learned. Wants clang++.
FUZZ_SECONDS ?= 60
.PHONY: sanitize fuzz
sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/native/sanitize.sh $(BIN)/python
fuzz: install
	tests/native/fuzz.sh $(BIN)/python $(FUZZ_SECONDS)

# Every reader of bytes from afar, coverage-guided (atheris): so many inputs in all. build/fuzz-events keeps what was
# learned, and the input of a finding.
FUZZ_RUNS ?= 200000
.PHONY: fuzz-events
fuzz-events: native
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
		$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,fuzz]'
	RHIZOME_RADIX=native $(BIN)/python -m tests.fuzz --runs $(FUZZ_RUNS)

# ARGS='--quick', ARGS='--json FILE'. The peer and the plots come with the extra "bench".
.PHONY: bench-index
bench-index: native
	@$(BIN)/python -c 'import dynamo.llm, matplotlib' 2>/dev/null || \
		$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.index $(ARGS)

.PHONY: bench-events
bench-events: native
	@$(BIN)/python -c 'import dynamo.llm, msgspec' 2>/dev/null || \
		$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.events $(ARGS)

.PHONY: bench-routing
bench-routing: native
	@$(BIN)/python -c 'import dynamo.llm' 2>/dev/null || \
		$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,bench]'
	$(BIN)/python -m benchmarks.routing $(ARGS)

.PHONY: bench-routing-scale
bench-routing-scale: native
	$(BIN)/python -m benchmarks.routing_scale $(ARGS)

.PHONY: bench-transfer
bench-transfer: native
	$(BIN)/python -m benchmarks.transfer $(ARGS)

.PHONY: bench-disagg
bench-disagg: native
	$(BIN)/python -m benchmarks.disagg $(ARGS)

# Wants Ray, which the extra "dev" brings.
.PHONY: bench-fleet-ray
bench-fleet-ray: native
	$(BIN)/python -m benchmarks.fleet_ray $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
