# Two commands on a fresh machine:  make demo   |   make test
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
BIN = $(VENV)/bin
CORE = $(VENV)/.installed
DEV = $(VENV)/.installed-dev

.PHONY: browser demo test slow faults soak lint bench docs notebooks gpu-check clean
export PIP_DISABLE_PIP_VERSION_CHECK = 1

$(CORE): pyproject.toml constraints.txt  # all that training, sampling and evaluating images needs
	@echo "setting up $(VENV): a minute or two, most of it for torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $(CORE)

$(DEV): $(CORE)  # tests and checks, molecules and crystals
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(DEV)

# The tests of `unilatent demo` drive a browser. Without one they are skipped, and say so.
BROWSERS = command -v chromium || command -v chromium-browser || command -v google-chrome
browser:
	@($(BROWSERS)) > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
		&& echo "installing chromium for the browser tests" && (timeout 60 apt-get update -qq; \
		timeout 300 apt-get install -y -qq --no-install-recommends chromium) > /dev/null 2>&1; } \
		|| echo "no chromium here: the browser tests are skipped"

demo: $(CORE)  ## train UNITE on the embedded digits (one to three minutes), print its table, draw its pictures
	$(BIN)/unilatent train digits --out $(OUT) --resume auto
	$(BIN)/unilatent sample $(OUT) --num 100 --labels 0-9 --out $(OUT)/pictures
	@echo "look at $(OUT)/pictures/grid.png (new digits, a column a class) and $(OUT)/recon/ (held-out digits over their reconstructions)"

test: $(DEV) browser  ## everything fast: no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(DEV)  ## minutes of training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

FAULT_TABLE = -p fault_table --fault-table docs/reliability.md

faults: $(DEV) browser  ## everything that a run survives, provoked; writes the table in docs/reliability.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(FAULT_TABLE) -m "not slow and not soak"

soak: $(DEV)  ## a hundred random kills, two thousand steps with two hundred saves; writes their rows of the table
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAULT_TABLE) -m soak

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SITE ?= build/site
DOCS = $(VENV)/.installed-docs

$(DOCS): $(CORE)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $(DOCS)

docs: $(DOCS)  ## the site in build/site, without a network: warnings are errors, and every link leads somewhere
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -b html -d build/site-cache docs $(SITE)
	$(BIN)/python docs/extensions/check_site.py $(SITE)
	$(BIN)/python tests/runs/documents.py | grep "^all"

notebooks: $(DEV)  ## run docs/notebooks and store their outputs
	$(BIN)/pip install --quiet -c constraints.txt -e ".[notebooks]"
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python benchmarks/notebooks.py

bench: $(DEV)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/sampling.py

GPU_CHECK ?=
gpu-check:  ## one GPU, ten minutes, no network, nothing installed: PYTHON is an interpreter that has torch
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
