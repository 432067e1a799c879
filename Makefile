# `make train` and `make test` do everything on a fresh machine; the rest are their parts.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := launch/configs/demo.yaml
RUN := runs/demo
STORE := datasets/demo.zarr
SCAN := datasets/demo.wind_scan
# The demo's batch is made for two ranks: one or two GPUs, or two CPU ranks.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(min(torch.cuda.device_count() or 2, 2))")
# One BLAS thread a rank: two ranks that each take both cores are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test test-all lint bench clean

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(STORE): | .venv/installed
	$(BIN)/python -m data synthesize $(STORE) --days 120 --grid 32 64

$(SCAN): | $(STORE)
	$(BIN)/python -m data wind-scan $(STORE) --out $(SCAN) --regions 8 16

# make train steps=1600 continues the same run.
train: .venv/installed | $(STORE) $(SCAN)
	RANKS=$(RANKS) launch/local.sh $(CONFIG) --deepspeed_config ds_configs/zero1.json $(if $(steps),steps=$(steps))
	$(BIN)/python -m trainer evaluate $(RUN) --samples 400
	$(BIN)/python -m trainer plot $(RUN)

test: .venv/installed lint
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/installed lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.embedding
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.elevation_bias
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.full_size_step

clean:
	rm -rf runs datasets .pytest_cache .ruff_cache .mypy_cache
