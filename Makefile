PYTHON ?= python3
ARGS ?=
SUITE ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
bin := .venv/bin
offline := $(bin)/specopt ab --offline --vocab-size 151936 --temperature 0,1,0.8:0.9 --output-len 32
four := "num_speculative_tokens": 4
quick := $(patsubst %,tests/%.py,cpu/test_cache cpu/test_requests test_compat test_config test_packaging test_reference \
  test_setup test_shapes test_triton test_verify)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-long prove peer parity drafters bench cost lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## create .venv with vLLM and this project (a few minutes once, then nothing)
	@$(PYTHON) scripts/set_up.py

demo: setup ## serve the shipped pair with 151,936 tokens, stock and exact, compare them, write reports/demo; ARGS="--quick"
	@$(bin)/specopt demo $(ARGS)

check: setup lint ## style, types, and the quick tests: reference, CPU, interpreter, configuration, packaging (3 minutes)
	@$(bin)/python -m pytest $(quick) -m "not engine and not long" --numprocesses 2 --dist loadfile $(ARGS)

test: setup ## run the tests, real engines included, in two processes; ARGS="-k name" picks some
	@$(bin)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: setup ## engines under stress, what repeats in many of them, every kernel variant (long)
	@$(bin)/python -m pytest tests -m long $(ARGS)

prove: setup ## prove that verification is lossless, write reports/prove.json (about 40 minutes); ARGS="--quick"
	@$(bin)/python tests/proof/run.py $(ARGS)

peer: setup ## run vLLM's own tests of its rejection sampler on ours, from vLLM's source release (2 minutes)
	@$(bin)/python tests/peer/run.py $(ARGS)

parity: setup ## run every sampling parameter on both runners, write docs/parity.md (about half an hour)
	@$(bin)/python tests/parity/run.py $(ARGS)

drafters: setup ## run every drafter that vLLM has here, write docs/drafters.md; ARGS="--runner V1"
	@$(bin)/python tests/drafters/run.py $(ARGS)

bench: setup ## measure kernels and engines against stock on an idle machine, write reports/bench (26 minutes on 2 cores)
	@$(bin)/specopt bench --suite $(SUITE) --out reports/bench
	@$(offline) -o reports/bench/probabilistic --draft models/specopt-draft models/specopt-target $(ARGS)
	@$(offline) -o reports/bench/greedy --speculative-config '{"model": "models/specopt-draft", $(four)}' $(ARGS)
	@$(offline) -o reports/bench/ngram --speculative-config '{"method": "ngram", "prompt_lookup_max": 3, $(four)}' $(ARGS)

cost: setup ## count the kernels' machine code, ours and vLLM's, without a GPU, write reports/cost; ARGS="--arch 90"
	@$(bin)/specopt cost --out reports/cost $(ARGS)

lint: setup ## check the code and its form with ruff, and the types with mypy
	@$(bin)/ruff check --quiet .
	@$(bin)/ruff format --check --quiet .
	@$(bin)/python scripts/check_types.py

clean: ## remove .venv, reports and caches
	rm -rf .venv build dist reports ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf scripts/vllm-cpu-metadata/build scripts/vllm-cpu-metadata/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
