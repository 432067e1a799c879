# `make train` and `make test` do everything on a fresh machine; the rest are their parts.
PYTHON ?= python3
BIN := .venv/bin
CONFIG := launch/configs/demo.yaml
RUN := runs/demo
STORE := datasets/demo.zarr
SCAN := datasets/demo.wind_scan
PATHS := datasets/demo.wind_paths
# The demo's batch is made for two ranks: one or two GPUs, or two CPU ranks.
RANKS ?= $(shell $(BIN)/python -c "import torch; print(min(torch.cuda.device_count() or 2, 2))")
# One BLAS thread a rank: two ranks that each take both cores are slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test test-fast test-all lint lock bench clean

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(STORE): | .venv/installed
	$(BIN)/python -m data synthesize $(STORE) --start 2015-04-01 --days 180 --grid 32 64 --train 0.6 --validation 0.1

$(SCAN): | $(STORE)
	$(BIN)/python -m data wind-scan $(STORE) --out $(SCAN) --regions 8 16

$(PATHS): | $(STORE)
	$(BIN)/python -m data wind-paths $(STORE) --out $(PATHS) --workers 2

# make train steps=2400 continues the same run; make train scan=regional RUN=runs/scan trains another with the wind scan.
train: .venv/installed | $(STORE) $(PATHS) $(if $(scan),$(SCAN))
	RANKS=$(RANKS) launch/local.sh $(CONFIG) --deepspeed_config ds_configs/zero1.json $(if $(steps),steps=$(steps)) \
	  run_dir=$(RUN) $(if $(scan),wind_scan.mode=$(scan) wind_scan.cache=$(SCAN))
	$(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m trainer evaluate $(RUN)
	$(BIN)/python -m trainer report $(RUN)

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 -m "not slow" --durations=20

# The inner loop of a developer: nothing that starts a process.
test-fast: .venv/installed
	$(BIN)/python -m pytest -n 2 -q -m "not slow" --fast

# Minutes-long tests too, and every guard of the fault table broken once.
test-all: .venv/installed lint
	TOPOFLOW_ALL_WAYS=1 $(BIN)/python -m pytest --durations=20
	$(BIN)/python -m tests.mutations

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.embedding
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.elevation_bias
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.full_size_step

# To update a library: change its version in the upper part of requirements.txt, `make lock`, look at the difference, then
# `make test-all`; commit what changed with what it was for. The lower part, what the others bring along, is written anew.
LINE := \# Brought along by those above (written by `make lock`):
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	sed '/^# Brought along/,$$d' requirements.txt > .lock/direct.txt
	.lock/bin/python -m pip install --quiet -r .lock/direct.txt
	grep -oE '^[A-Za-z0-9_.-]+' .lock/direct.txt | tr 'A-Z_' 'a-z-' > .lock/names.txt
	.lock/bin/python -m pip freeze | awk -F'==' 'NR == FNR { direct[$$1]; next } { name = tolower($$1); gsub("_", "-", name) } \
	  !(name in direct) && name !~ /^(nvidia|triton|pip)/' .lock/names.txt - > .lock/brought.txt
	{ cat .lock/direct.txt; printf '%s\n' '$(LINE)'; cat .lock/brought.txt; } > requirements.txt
	rm -rf .lock
	git diff --stat requirements.txt
	@echo "requirements.txt is written; now: rm -rf .venv && make test-all"

clean:
	rm -rf runs datasets .pytest_cache .ruff_cache .mypy_cache
