# make serve    install into .venv and serve the bundled model (MODEL=file.gguf ARGS="--port 9000")
# make test     install the developers' tools too, check the code and run all tests
#
# PYTHON= and CXX= choose another interpreter or compiler; `make clean` first when .venv exists.

VENV := .venv
BIN := $(VENV)/bin
# Bytecode is left to the first import: compiling all of it costs more than everything else here.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# Built without pip's isolation, so that a second build compiles what changed and nothing else;
# the first three names are build-system.requires of pyproject.toml.
BUILD_TOOLS := 'scikit-build-core>=0.10' 'nanobind>=2.4' 'numpy>=2.0' cmake ninja
SOURCES := pyproject.toml CMakeLists.txt \
  $(shell find fomoe -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt 2>/dev/null)
MODEL ?=
ARGS ?=
# Tests on Ray run one after the other, all others side by side: in the order of their names, as the
# long ones must not be begun last.
APART := $(addprefix tests/,e2e ray_cluster)

.PHONY: serve test check venv stop clean

serve: $(VENV)/installed
	@exec $(BIN)/fomoe serve $(MODEL) $(ARGS)

test: check
ifeq ($(ARGS),)
	@$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder \
	  $(addprefix --ignore=,$(APART))
	@$(BIN)/python -m pytest -q $(APART)
else
	@$(BIN)/python -m pytest -q $(ARGS)
endif

check: $(VENV)/installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

venv: $(VENV)/installed-dev

stop:
	@$(BIN)/fomoe stop

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/build-tools:
	@set -e; python=$$(sh tools/preflight.sh); \
	  echo "[1/3] creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV)
	@echo "[2/3] fetching build tools"
	@$(PIP) $(BUILD_TOOLS)
	@touch $@

$(VENV)/installed: $(VENV)/build-tools $(SOURCES)
	@echo "[3/3] fetching libraries (Ray is the big one) and compiling the kernels: a minute or two"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/build-tools $(SOURCES)
	@echo "[3/3] fetching libraries and tools, compiling the kernels: a minute or two"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/installed
