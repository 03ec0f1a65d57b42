# Shortcuts for contributors; each is one command of admin/ or of .venv.
.DEFAULT_GOAL := help
.PHONY: help install uninstall build demo run up down test tests all check lint unit lab bench-lab format docs lock clean

help: ## show these targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "also: build = install, run = demo, tests = all = test, lint = check"

install: ## install what is missing: Debian packages (as root) and .venv
	@admin/install --test

uninstall: ## remove .venv; Debian packages stay
	@rm -rf .venv

demo: ## run the main job on a real disk image, on this machine
	@admin/demo

up: install ## start a sandbox: a whole cluster on this machine
	@.venv/bin/imgstorage sandbox up

down: ## stop it; its data stays
	@.venv/bin/imgstorage sandbox down

test: ## all checks and all tests
	@admin/test

check: install ## style, layout, types, imports
	@admin/check

unit: ## the unit tests
	@admin/test tests/unit

lab: ## the tests in virtual machines, with real ZFS, iSCSI and device-mapper (as root)
	@admin/lab run

bench-lab: ## measure the kernel plane in virtual machines (as root; WORDS="runs=3 json=FILE")
	@admin/lab bench $(WORDS)

format: install ## lay out the code and put right what can be
	@.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format .

docs: install ## write anew what is generated in docs/
	@.venv/bin/python -m imgstorage.core.diagram > docs/state-machine.md
	@.venv/bin/python -m imgstorage.core.catalogue messages > docs/messages.md
	@.venv/bin/python -m imgstorage.core.catalogue errors > docs/errors.md
	@.venv/bin/python -m imgstorage.cli.reference > docs/commands.md
	@mkdir -p docs/man && .venv/bin/python -m imgstorage.cli.man > docs/man/imgstorage.1

lock: ## write the locked requirements anew (UPGRADE=1: newest versions)
	@admin/lock $(if $(UPGRADE),--upgrade)

clean: ## remove what was made here, but nothing under version control
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

build: install
run: demo
tests all: test
lint: check
