# A machine needs Python 3.11+ and make, nothing else; uv is used where it is installed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-all test-soak test-slurm lint clean

train: .venv/ready          ## the default run; make train ARGS="dataset=imagenette backbone=dino_vits16"
	$(BIN)/python -m dino.train $(ARGS)

test: .venv/ready           ## make test ARGS="tests/test_loss.py"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all: .venv/ready       ## with the slow ones: whole programs, several processes, sweeps
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm and not soak" -n auto --dist worksteal $(ARGS)

test-soak: .venv/ready      ## twenty kills, 2,000 steps, the compiler, every bad value of every key
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n auto --dist worksteal $(ARGS)

test-slurm: .venv/ready     ## what needs a SLURM cluster: launch/ on a real one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/test_slurm.py $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml
	if command -v uv > /dev/null; \
	then uv venv --allow-existing -q .venv && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q -e '.[dev]'; \
	fi
	touch $@

clean:
	rm -rf .venv outputs/*
