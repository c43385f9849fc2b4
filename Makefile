# make demo | test | docs | bench | clean. Everything is installed into .venv, which needs python3 (3.11 or newer) only.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test docs bench clean

demo: $(VENV)/demo.stamp
	@$(BIN)/qkd-tls demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term $(PYTEST_ARGS)

docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -W -n --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks/handshake.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/key_pool.py
	$(BIN)/python benchmarks/tunnel.py
	$(BIN)/python benchmarks/post_processing.py
	$(BIN)/python benchmarks/link_rate.py

clean:
	rm -rf $(VENV) node_modules build dist docs/_build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The stamps are older than pyproject.toml where something may have to be installed.
$(VENV)/demo.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"qkd-tls needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.13" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --editable '.[emulator]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install --group test
	@touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(PIP) install --group docs
	@touch $@
