# make demo, make test, make lint: each sets up all that it needs in .venv, on a machine with Python 3.11+, make and git.

MAKEFLAGS += --no-builtin-rules
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SUFFIXES:

# PYTHON=/path/to/python3.12 takes that one; else the first of these that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv/bin/python
WORKERS ?= 2

.PHONY: help demo test slow fuzz mutants signals lowest templates lint gate pytest compiler clean

help:
	@echo "make demo     compile, inspect, benchmark and run the tiny model (on a GPU if there is one)"
	echo "make test     lint, types and every test that needs no GPU; WORKERS=N processes, at most 1.5 GB each"
	echo "make slow     the tests that compile or fail for minutes; needs g++"
	echo "make mutants  breaks a copy of the tree in ways that tests must notice; needs g++ and git, takes minutes"
	echo "make signals  ends commands at 200 random moments and looks at what they leave; needs g++, takes minutes"
	echo "make lowest   the tests with the lowest versions that pyproject.toml declares; needs g++ and a package index"
	echo "make fuzz     wrong model files for SECONDS=240, none of which may bring more than one line"
	echo "make templates TEMPLATES=FOLDER  published chat templates against what transformers writes of them"
	echo "make lint     ruff and mypy"
	echo "make gate     reports, claims and policy against each other"
	echo "make clean    remove everything that make wrote"

demo: .venv/installed
	@PSIGRAPH_PYTHON=$(VENV) bash scripts/demo.sh

test: compiler lint gate pytest

pytest: compiler .venv/installed-dev
	@$(VENV) -m pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow"

# What takes minutes: unfused kernels under the sanitizers, every failure of every call of the driver.
slow: compiler .venv/installed-dev
	@$(VENV) -m pytest -q -n $(WORKERS) -m "slow and not gpu"

# Model files with mistakes, through every stage; SEED=TEXT makes others than yesterday's, and other moments of signals.
SECONDS ?= 240
SEED ?= psigraph
fuzz: .venv/installed-dev
	@$(VENV) scripts/fuzz --seconds $(SECONDS) --seed '$(SEED)'

# Tests that do not fail when the code is wrong prove nothing: scripts/mutants/mutants.toml.
mutants: compiler .venv/installed-dev
	@$(VENV) scripts/mutants

# Commands end at any moment by a documented exit code, leave no process and no temporary file, within 2 s.
signals: compiler .venv/installed-dev
	@$(VENV) scripts/signals.py --runs $(or $(RUNS),200) --seed '$(SEED)'

# What pyproject.toml declares is what runs: an environment of its own with the lowest of all versions.
lowest: compiler .venv/installed-dev
	@echo "setting up .make/lowest"
	$(PYTHON) -m venv --clear .make/lowest
	$(VENV) scripts/lowest_versions.py > .make/lowest/requirements.txt
	.make/lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		--constraint .make/lowest/requirements.txt
	.make/lowest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow"

# Templates of others are not kept here: scripts/template_reference.py says where they are.
TEMPLATES ?=
templates: .venv/installed-dev
	@test -n "$(TEMPLATES)" || {
		echo "name a folder of templates: make templates TEMPLATES=FOLDER; scripts/template_reference.py says where" >&2
		exit 1
	}
	$(VENV) scripts/template_reference.py check "$(TEMPLATES)"

compiler:
	@command -v g++ > /dev/null || {
		echo "the tests run the kernels on the CPU and need g++: apt-get install g++ (or: dnf install gcc-c++)" >&2
		exit 1
	}

# Claims, reports and policy agree with each other; the gate's own tests are among pytest's.
gate: .venv/installed-dev
	@PYTHON=$(VENV) bash scripts/release/check-psionic-medpsy-pilot.sh --no-tests

lint: .venv/installed-dev
	@$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	# mypy cannot map top-level folders to sub-packages, so it sees them through links under one folder.
	rm -rf .make/typed
	mkdir -p .make/typed/psigraph
	ln -s "$(CURDIR)"/psigraph/* "$(CURDIR)"/{ir,passes,codegen,runtime,models} .make/typed/psigraph/
	cd .make/typed
	../../$(VENV) -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p psigraph
	../../$(VENV) -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy ../../scripts/release/gate.py

# The tools run as `python -m`, never through the scripts beside it, whose first line holds the path where the
# environment was made: so a moved repository needs nothing but a new install. The stamp holds that path.
# An environment whose Python is gone, too old, or another one than when it was made goes: nothing in it works.
WORKS := import os, sys, sysconfig; sys.exit(sys.version_info < (3, 11) or not os.path.isdir(sysconfig.get_paths()["purelib"]))
ifneq ($(wildcard .venv),)
ifneq ($(shell $(VENV) -c '$(WORKS)' 2> /dev/null && echo works),works)
$(shell rm -rf .venv)
endif
endif
ifneq ($(shell test -x $(VENV) && cat .venv/installed 2> /dev/null),$(CURDIR))
$(shell rm -f .venv/installed .venv/installed-dev)
endif

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || {
		echo "psigraph needs Python 3.11 or newer; set PYTHON=/path/to/it" >&2
		exit 1
	}
	$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || {
		echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2
		exit 1
	}
	echo "setting up .venv (once)"
	test -x $(VENV) || $(PYTHON) -m venv --clear .venv
	$(VENV) -m pip install --quiet --disable-pip-version-check --editable .
	echo "$(CURDIR)" > $@

.venv/installed-dev: .venv/installed
	@$(VENV) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .make build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo-out
