# Two commands for a fresh machine: `make demo` (add TINY=1 for the two-minute version) and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
export TORCH_EXTENSIONS_DIR

.PHONY: help demo test lint coverage audit lock docs clean

help:
	@echo "make demo [TINY=1]   install into $(VENV) and fine-tune a real model with SalientLoRA on 2 processes"
	@echo "make test            install into $(VENV) and run the test suite"
	@echo "make lint            ruff and mypy"
	@echo "make coverage        the test suite with coverage, subprocesses included"
	@echo "make docs            the documentation site, in build/docs/site (an environment of its own)"
	@echo "make audit           known vulnerabilities of the versions in requirements.lock (needs the network)"
	@echo "make lock            write requirements.lock anew: exact versions with hashes, Linux, Python 3.11 (needs the network)"

$(BIN)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

demo: $(BIN)/.installed-demo
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python launch/demo/demo.py $(if $(TINY),--tiny)

test: $(BIN)/.installed-test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # a file's fixtures are made once, long files come first

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check salient_ds eval tests launch
	$(BIN)/mypy

coverage: $(BIN)/.installed-dev
	$(BIN)/coverage erase
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

docs:
	test -x $(VENV)-docs/bin/mkdocs || { $(PYTHON) -m venv $(VENV)-docs && $(VENV)-docs/bin/pip install --quiet "mkdocs-material>=9.6,<10"; }
	$(PYTHON) docs/pages.py
	$(VENV)-docs/bin/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

audit: $(BIN)/.installed-dev
	$(BIN)/pip-audit --disable-pip --no-deps --requirement requirements.lock

lock: $(BIN)/.installed-dev
	$(BIN)/pip install --quiet "uv>=0.9"
	$(BIN)/uv pip compile pyproject.toml --extra test --extra demo --extra dev --extra liger --no-config --upgrade \
	  --python-version 3.11 --python-platform x86_64-unknown-linux-gnu --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
