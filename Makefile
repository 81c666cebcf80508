# A machine needs Python 3.11.4+ and make, nothing else; uv is used where it is installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Downloads and archives, data workers, start-up and imports, typing and dataclasses, and a whole run.
ON_PYTHON := dataset loading/test_workers.py test_layout.py config test_train.py weights run/test_checkpoint.py

.PHONY: train test test-all test-soak test-slurm test-python lint clean

train: $(VENV)/ready          ## the default run; make train ARGS="dataset=imagenette backbone=dino_vits16"
	$(BIN)/python -m dino.train $(ARGS)

test: $(VENV)/ready           ## make test ARGS="tests/loss/test_dino.py"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all: $(VENV)/ready       ## with the slow ones: whole programs, several processes, sweeps
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm and not soak" -n auto --dist worksteal $(ARGS)

test-soak: $(VENV)/ready      ## twenty kills, 2,000 steps, the compiler, every bad value of every key
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak -n auto --dist worksteal $(ARGS)

test-slurm: $(VENV)/ready     ## what needs a SLURM cluster: launch/ on a real one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/launch/test_slurm.py $(ARGS)

test-python: $(VENV)/ready    ## what depends on the Python; make test-python PYTHON=python3.13 VENV=.venv-3.13
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slurm and not soak and not slow" -n auto --dist worksteal \
	  $(addprefix tests/,$(ON_PYTHON)) $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml
	if command -v uv > /dev/null; \
	then uv venv --allow-existing -q --python $(PYTHON) $(VENV) && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q -e '.[dev]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) outputs/*
