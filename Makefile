# Two commands on a fresh machine:  make demo   |   make test
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/digits
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test slow faults soak lint bench clean
export PIP_DISABLE_PIP_VERSION_CHECK = 1

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)  ## train UNITE on the embedded digits (3 to 4 minutes), print its table, draw its pictures
	$(BIN)/unilatent train digits --out $(OUT) --resume auto
	$(BIN)/unilatent sample $(OUT) --num 100 --labels 0-9 --out $(OUT)/pictures
	@echo "look at $(OUT)/pictures/grid.png (new digits, a column a class) and $(OUT)/recon/ (held-out digits over their reconstructions)"

test: $(STAMP)  ## everything fast: no network, no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(STAMP)  ## minutes of training
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

FAULT_TABLE = -p fault_table --fault-table docs/reliability.md

faults: $(STAMP)  ## everything that a run survives, provoked; writes the table in docs/reliability.md
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(FAULT_TABLE) -m "not slow and not soak"

soak: $(STAMP)  ## a hundred random kills, two thousand steps with two hundred saves; writes their rows of the table
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAULT_TABLE) -m soak

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/sampling.py

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
