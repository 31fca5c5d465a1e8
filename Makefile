# make run        install, draw the dataset, execute the five notebooks; copies in runs/notebooks
# make test       install, lint, run all tests
# make notebooks  execute the notebooks and write the results into them
# make faults     kill runs, nodes' workers, fill disks; see that nothing is lost (minutes)
# make clean      remove what the above have made: environment, drawn dataset, its runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test notebooks faults clean

run: .venv/ready
	$(BIN)/python run_notebooks.py

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

notebooks: .venv/ready
	$(BIN)/python run_notebooks.py --in-place

faults: .venv/ready
	$(BIN)/python tests/faults.py

# uv installs in seconds what pip takes minutes for, and picks a matching torch and torchvision.
.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv data/sample runs/sample runs/notebooks runs/cache
