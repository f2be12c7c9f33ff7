# Two commands do all the set-up: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test slow faults compose-test docs lint install clean

quickstart: $(VENV)/.quickstart   ## fine-tune a real model on eight simulated clients at epsilon 8
	$(BIN)/fedlora simulate configs/quickstart.yaml

test: install         ## the test suite, in two processes: many tests wait for others
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: install         ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

faults: install       ## faults F1 to F54 of docs/reliability.md, the slow ones too, and five hundred kills of a node
	FEDLORA_KILLS=500 $(BIN)/python -m pytest -m fault -rs -n 3 --dist loadfile   # they wait more than they work

compose-test: install ## the compose file, started for real; with no Docker engine, root may start one
	$(BIN)/python -m pytest -s -rs -m slow tests/deploy/test_compose.py

docs: install         ## the site, into docs/_build
	$(BIN)/python -m pip install --quiet '.[docs]'
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

lint: install         ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@echo "installing fedlora and what its tests need into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,dev]'
	touch $@ $(VENV)/.quickstart

$(VENV)/.quickstart: pyproject.toml
	@echo "installing fedlora into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	touch $@

clean:
	rm -rf $(VENV) runs
