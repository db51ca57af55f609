# `make demo` and `make test` set up all they need in a local virtual environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# A release with a CPU build, so that a machine without a GPU does not fetch gigabytes of CUDA.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
DEMO_RESULTS := demo-results
QUICK := $(addprefix tests/,$(addprefix flash_attention/test_,dispatch.py problem.py \
    problem_masking.py promises.py reference.py survey.py) \
  $(addprefix audio/test_,lengths.py samples.py samples_channels.py) \
  $(addprefix batch/test_,manifest.py progress.py results.py shards.py sink.py) \
  $(addprefix benchmark/test_,report.py results.py settings.py) \
  $(addprefix engine/test_,layout.py layout_state.py logits_processors.py) \
  $(addprefix kernels/test_,launch.py layer_norm.py transpose.py) \
  $(addprefix transcribe/test_,cues.py hallucination.py output.py prompts.py \
    results.py segmentation.py segmentation_clips.py segmentation_leftovers.py writers.py) \
  $(addprefix weights/test_,ctranslate2_variables.py sources.py tokens.py) \
  $(addprefix test_,cache.py options.py public_names.py validation.py))
RECORDING := whisper_flash_attention/data/recordings/austen_0870.wav

.PHONY: demo test quick lint types check docs matrix matrix-without-pytorch gpu hf-suite clean

demo: $(VENV)/.demo
	$(BIN)/whisper-flash transcribe $(RECORDING) --model package:tiny.en
	$(BIN)/whisper-flash benchmark --setting small --checkpoint tiny --system orig --system flash \
	  --device cpu --output $(DEMO_RESULTS)

# One process more than CI has cores, since some tests wait for others' work.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

# While working: linters, types, and the tests that need neither real weights nor many kernels.
quick: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(QUICK)

# The site, in build/site. Two packages print advertisements as warnings.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

# Every Python found, newest and oldest dependencies: gigabytes for each release of PyTorch.
matrix: $(VENV)/.dev
	$(PIP) uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/matrix.py

# Its part that needs no PyTorch: decoding, manifests, writers, the command's help.
matrix-without-pytorch: $(VENV)/.dev
	$(BIN)/python tools/matrix.py --without-pytorch

# On a machine with a CUDA GPU; CONTRIBUTING.md says what xFormers needs there.
gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# Transformers' own tests of Whisper with our class; HF_TESTS is the tests folder of a checkout of
# Transformers (docs/hf-suite.md).
hf-suite: $(VENV)/.dev
	$(PIP) parameterized httpx pytest-timeout
	$(BIN)/python tools/hf_suite.py --work build/hf-suite --tests $(or $(HF_TESTS),build/transformers/tests) \
	  --output benchmarks/results/hf-suite.json

clean:
	rm -rf $(VENV) $(DEMO_RESULTS) build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo,plots]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo,dev]' $(TRITON)
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@
