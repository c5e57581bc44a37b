# `make` lists what there is. Everything is installed in .venv; of what is outside this folder, pip's cache alone grows.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Rules run `python` and `snakemake` from .venv, activated or not.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Unset, Table 2 has openSMILE's row; `make demo OPENSMILE=0` leaves it out.
OPENSMILE ?= 1
# Test processes at once; the tests of a file share a run of the workflow, so that they stay in one.
WORKERS ?= 2

INSTALLED := .venv/.installed
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input
# The resolver is needed by `make lock` alone, so it is kept apart from what the locks install.
UV_VERSION := 0.13.9
UV := .venv/uv-$(UV_VERSION)/bin/uv
# Kept apart likewise; what it finds depends on the day.
PIP_AUDIT_VERSION := 2.10.1
PIP_AUDIT := .venv/pip-audit-$(PIP_AUDIT_VERSION)/pip_audit
# One resolution for the platform that is supported, wherever it is made.
COMPILE := $(UV) pip compile --quiet --generate-hashes --no-header --no-emit-index-url --no-emit-find-links \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28
MUTMUT_VERSION := 3.8.1
MUTMUT := .venv/mutmut-$(MUTMUT_VERSION)/mutmut
RUN_MUTMUT := PYTHONPATH=$(CURDIR)/$(dir $(MUTMUT)) python -m mutmut
COVERAGE_VERSION := 7.17.5
COVERAGE := .venv/.coverage-$(COVERAGE_VERSION)
GPU := $(shell nvidia-smi --list-gpus 2> /dev/null | grep GPU)

# A reader who has an archive needs no torch: without the whole environment, a small one is made.
LIGHT := $(if $(wildcard $(INSTALLED)),,.venv-tables/)

.PHONY: help setup opensmile demo report archive tables test test-heavy test-soak test-faults test-slurm test-conda mutants coverage
.PHONY: bench lint format lock envs reference licences audit clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(INSTALLED)  ## install the locked environment in .venv

.venv/bin/python .venv-tables/bin/python:
	@for python in python3.11 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; then \
			$$python -m venv $(@D)/.. && exit 0; \
			rm -rf $(@D)/..; echo "'$$python -m venv' failed; on Debian: apt install python3.11-venv" >&2; exit 1; \
		fi; \
	done; \
	echo "Python 3.11 is needed, and neither python3.11 nor python3 is that" >&2; exit 1

.venv/.locked: requirements/main.lock | .venv/bin/python
	@echo "Installing the locked packages in .venv; the first time 3.6 GB are downloaded, 7 GB when unpacked, which"
	@echo "takes 2 to 10 minutes. Of the downloads, the larger ones are listed:"
	@$(PIP) install --progress-bar off --require-hashes -r requirements/main.lock \
		| { grep --line-buffered -oE 'Downloading .*\(([0-9]{3,}\.[0-9] MB|.* GB)\)|^Installing' || true; }
	@touch $@

$(INSTALLED): .venv/.locked pyproject.toml
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

opensmile: .venv/.opensmile  ## add openSMILE, for research use only, for a row of Table 2

.venv/.opensmile: requirements/opensmile.lock $(INSTALLED)
	@echo "openSMILE's licence (audEERING) is for private and research use: see its LICENSE before any other."
	@$(PIP) install --quiet --no-deps --require-hashes -r requirements/opensmile.lock
	@touch $@

# Snakemake lists every page; that is shown only where something is wrong.
REPORT = log=$$(snakemake --report results/$1-report.html $2 2>&1) || { tail -n 20 <<< "$$log" >&2; exit 1; }
# PRESET names a file in presets/; CONFIG has further changes, as --config takes them.
PRESETS := $(basename $(notdir $(wildcard presets/*.yaml)))
OF_RUN = $(if $(PRESET),--configfile $(if $(filter $(PRESET),$(PRESETS)),presets/$(PRESET).yaml,$(error PRESET is \
	$(PRESET), but presets/ has $(PRESETS)))) $(CHANGES)
CHANGES = $(if $(CONFIG)$(filter 0,$(OPENSMILE)),--config $(CONFIG) $(if $(filter 0,$(OPENSMILE)),'tables={"baseline": "none"}'))
DEMO = --configfile presets/demo.yaml $(CHANGES)

demo: setup $(if $(filter 0,$(OPENSMILE)),,opensmile)  ## every stage and table on synthetic speech, in minutes
	@snakemake --cores all $(DEMO) $(if $(GPU),,--workflow-profile workflow/profiles/cpu)
	@gmp-atl show results/demo/tables
	@$(call REPORT,demo,$(DEMO))
	@echo
	@echo "All of this with figures, in one page for a browser: results/demo-report.html."
	@echo "These tables (CSV, Markdown, LaTeX): results/demo/tables; figures: results/demo/figures."
	@echo "The paper's experiment, with IEMOCAP at hand (see README.md):"
	@echo "    . .venv/bin/activate; snakemake --cores all"

report: setup  ## a run's tables and figures as one page, results/PRESET-report.html; the paper's without PRESET
	@$(call REPORT,$(or $(PRESET),iemocap),$(OF_RUN))
	@echo "results/$(or $(PRESET),iemocap)-report.html"

archive: setup  ## pack what tables need of a run in results/NAME/NAME.zip; PRESET=demo for another than the paper's
	@snakemake --cores all archive $(OF_RUN) $(if $(GPU),,--workflow-profile workflow/profiles/cpu)

tables: $(if $(FROM),$(if $(LIGHT),.venv-tables/.installed))  ## make the tables and figures of an archive anew, FROM=FILE
	@test -n "$(FROM)" || { echo "Which archive? make tables FROM=results/demo/demo.zip" >&2; exit 2; }
	@PYTHONPATH=src $(or $(LIGHT),.venv/)bin/python -m gmp_atl restore "$(FROM)"

.venv-tables/.installed: requirements/tables.lock | .venv-tables/bin/python
	@echo "Installing the few packages that tables need in .venv-tables"
	@.venv-tables/bin/python -m pip --disable-pip-version-check --no-input install --quiet --require-hashes -r $<
	@touch $@

test: setup  ## run the tests
	@python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

test-heavy: setup  ## try a hundred times as many bad files, and a manifest of a million rows; takes five minutes
	@FUZZ_EXAMPLES=1500 python -m pytest -m "heavy or not heavy" tests/test_bad_input.py

test-soak: setup  ## ten seeds in one results folder, with memory, files and disk watched; takes a quarter of an hour
	@python -m pytest -m heavy -s tests/test_soak.py

test-faults: opensmile  ## kill, stop and starve every stage, again and again; as root, for full disks; takes half an hour
	@FAULT_TRIALS=$(or $(TRIALS),20) python -m pytest tests/test_faults.py

test-slurm: setup  ## run the SLURM tests; as root, and on Debian: they install and start SLURM
	@python -m pytest testbeds/slurm

test-conda: opensmile .venv/.conda  ## test the rules' Conda environments; 13 GB, kept in .testbeds
	@python -m pytest testbeds/conda

.venv/.conda: requirements/conda.lock $(INSTALLED)
	@$(PIP) install --quiet --no-deps --require-hashes -r requirements/conda.lock
	@touch $@

# mutmut keeps results, but does not follow changes of tests: all is tried anew. With one thread, since mutants run in
# forked processes, which would wait for threads that they lack.
mutants: setup $(MUTMUT)  ## put a thousand faults into losses, masking, folds, metrics and clustering, for tests to find
	@rm -rf mutants
	@OMP_NUM_THREADS=1 $(RUN_MUTMUT) run --max-children $(WORKERS)
	@$(RUN_MUTMUT) results --all true | python tools/mutants.py

$(MUTMUT): | .venv/bin/python
	$(PIP) install --quiet --target $(dir $(MUTMUT)) mutmut==$(MUTMUT_VERSION)

coverage: setup $(COVERAGE)  ## run the tests and tell which lines and branches of the package they reach
	@rm -f .coverage .coverage.*
	@python -m coverage run -m pytest -n $(WORKERS) --dist loadfile
	@python -m coverage combine --quiet
	@python -m coverage report --show-missing --skip-covered
	@python -m coverage json --quiet -o - | python tools/coverage_floors.py

# In .venv itself: only what site-packages holds is imported by every Python, the jobs of the workflow among them.
$(COVERAGE): | .venv/bin/python
	$(PIP) install --quiet --no-deps coverage==$(COVERAGE_VERSION)
	@touch $@

bench: setup  ## measure the stages beside their peers' ways; on two idle cores it takes an hour and a half
	@for work in extraction kmeans_fit labels training operations gpu; do echo "## $$work"; python benchmarks/$$work.py; done

lint: setup  ## check format, style, types and the workflow
	ruff format --check .
	ruff check .
	snakefmt --compact-diff --check Snakefile workflow
	mypy
	snakemake --lint --configfile presets/demo.yaml --workflow-profile none

format: setup  ## format Python and Snakemake files
	ruff check --fix-only --quiet .
	ruff format .
	snakefmt Snakefile workflow

# Versions stay as they are where pyproject.toml allows; delete a lock first to renew its indirect dependencies.
lock: $(UV)  ## resolve requirements/*.lock from pyproject.toml
	$(COMPILE) pyproject.toml --group dev --output-file requirements/main.lock
	$(COMPILE) --group opensmile --constraints requirements/main.lock --output-file requirements/opensmile.lock \
		$$(sed -nE 's/^([a-z0-9-]+)==.*/--no-emit-package \1/p' requirements/main.lock)
	$(COMPILE) --group conda --output-file requirements/conda.lock

$(UV): | .venv/bin/python
	$(PIP) install --quiet --target .venv/uv-$(UV_VERSION) uv==$(UV_VERSION)

envs: opensmile  ## write envs/*.yaml and requirements/tables.lock from the locks
	python tools/envs.py

reference: setup  ## write docs/config.md and the config's schema from the typed config
	python tools/config_reference.py

licences: setup  ## write docs/licences.md from the locks
	python tools/licences.py

# --strict: a package that the advisories' server does not know is a failure, and no silent gap.
audit: $(PIP_AUDIT)  ## look up the locked packages among known vulnerabilities; needs the network
	@PYTHONPATH=$(dir $(PIP_AUDIT)) .venv/bin/python -m pip_audit --strict --disable-pip --require-hashes \
		-r requirements/main.lock

$(PIP_AUDIT): | .venv/bin/python
	$(PIP) install --quiet --target $(dir $(PIP_AUDIT)) pip-audit==$(PIP_AUDIT_VERSION)

clean:  ## remove .venv and caches; results stay
	rm -rf .venv .venv-tables .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* mutants src/*.egg-info
	find src tests tools -name __pycache__ -prune -exec rm -rf {} +
