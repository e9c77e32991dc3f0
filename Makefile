# What a newcomer needs: `make demo`, `make test`, `make check`, `make bench`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-kill check bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[eval,bnb,gguf,notebooks,test]'
	touch $@

# Quantizes the embedded toy Grok to int4 and compares it with bf16.
demo: install
	$(BIN)/grokquant quantize recipes/toy-int4.yaml
	$(BIN)/grokquant eval runs/toy-int4 --reference toy

test: install
	$(BIN)/python -m pytest

# Kills and starves a small run at every step: 20 minutes.
test-kill: install
	$(BIN)/python -m pytest -m kill

# Style and types.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Prints one JSON line per benchmark.
bench: install
	for program in eval/bench/*.py; do $(BIN)/python $$program || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info
