# make demo        a QKD link, two KMEs, an HTTPS server and a client, on this machine
# make check       linters, types and the pure tests: in less than a minute
# make essentials  check, and the tests of sockets, asyncio, the engine and the KME client
# make test        linters, types and all tests
# make others      essentials on each other Python found, and with the oldest dependencies
# make matrix      test on each Python found, and with the oldest dependencies: before an issue is closed
# make docs | bench | clean
#
# Everything is installed into .venv (.venv-3.12, .venv-oldest), which needs python3 (3.11 or newer) only.

PYTHON ?= python3
VENV ?= .venv
# A file of versions for pip.
CONSTRAINTS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# On all cores: how many processes that are, tests/support/plugin.py says.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
INSTALL := $(PIP) install $(CONSTRAINTS:%=--constraint %)

.PHONY: demo lint check essentials test others matrix docs bench clean

demo: $(VENV)/demo.stamp
	@$(BIN)/qkd-tls demo

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only the files that have pure tests: to import all others takes longer than to run these.
check: lint
	$(PYTEST) -m pure $$(grep -rlF pytest.mark.pure tests --include='test_*.py') $(PYTEST_ARGS)

ESSENTIAL := $(addprefix tests/,qkd_tls/engine qkd_tls/aio qkd_tls/test_*.py kms_client/test_*.py)

essentials: check
	$(PYTEST) -m "not pure and not slow" $(ESSENTIAL) $(PYTEST_ARGS)

test: lint
	$(BIN)/coverage erase
	$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

# Of each version one: from the PATH, or from pyenv, whose commands on the PATH do not always start.
PYTHONS ?= $(shell for version in 3.11 3.12 3.13 3.14; do \
	for python in python$$version $$(pyenv root 2> /dev/null)/versions/$$version.*/bin/python$$version; do \
		$$python -c "" 2> /dev/null && echo $$python && break; done; done; true)
THIS = $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')

# $(call each,target,pythons): an environment for each.
define each
	set -e; for python in $(2); do \
		echo "$(1): $$python"; $(MAKE) --no-print-directory $(1) PYTHON=$$python VENV=$(VENV)-$${python##*python}; done
	@echo "$(1): the oldest dependencies"
	$(MAKE) --no-print-directory $(1) VENV=$(VENV)-oldest CONSTRAINTS=tests/constraints/oldest.txt
endef

others:
	@$(call each,essentials,$(filter-out %$(THIS),$(PYTHONS)))

matrix:
	@$(call each,test,$(PYTHONS))

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
	rm -rf $(VENV) $(VENV)-* node_modules build dist docs/_build .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The stamps are older than pyproject.toml where something may have to be installed.
$(VENV)/demo.stamp: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"qkd-tls needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.13" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(INSTALL) --editable '.[emulator]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(INSTALL) --group test
	@# For scripts that use names of the first version: see tests/shim/old_names.py.
	@printf '%s\nimport old_names\n' "$(CURDIR)/tests/shim" > \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/old_names.pth"
	@touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(INSTALL) --group docs
	@touch $@
