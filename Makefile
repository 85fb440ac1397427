# Two commands do all set-up: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard proto/rhizome/v1/*.proto)

.PHONY: install demo test test-slow check proto wheel-check clean
.DEFAULT_GOAL := install

install: $(VENV)/.installed

# CPU wheels of torch suffice here; where pip would fetch a CUDA build, set PIP_EXTRA_INDEX_URL to a CPU index.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Rhizome needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/rhizome demo

test: install check
	$(BIN)/pytest -m 'not slow'

test-slow: install
	$(BIN)/pytest -m slow --timeout=3600

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

proto: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

# Every module of the wheel that needs no torch, so that a missing file or dependency shows.
IMPORT_ALL := import importlib, pkgutil, deploy, kv_events, radix, rhizome, router, worker; \
	names = [m.name for p in (deploy, kv_events, radix, rhizome, router, worker) \
		for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".", onerror=lambda name: None)]; \
	missing = set(); \
	exec("for name in names:\n try: importlib.import_module(name)\n except ModuleNotFoundError as e: missing.add(e.name)"); \
	assert missing <= {"torch", "safetensors"}, missing; \
	print("wheel:", len(names), "modules import, but for", missing)

# The wheel, not only the editable install: built, put into an empty environment (which, without the extra "worker",
# has no torch), every package imported.
wheel-check: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && venv/bin/rhizome --help >/dev/null && \
		venv/bin/python -c '$(IMPORT_ALL)' && \
		(venv/bin/rhizome model tiny --out tiny 2>&1 || true) | grep -F "pip install 'rhizome[worker]'"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
