# What a newcomer needs: `make demo`, `make test`, `make check`, `make docs`, `make bench`.
PYTHON ?= python3
BIN := .venv/bin
READERS := .readers

.PHONY: install demo test fuzz test-browser test-kill test-ranks test-kernels test-readers test-engines test-families peers check docs bench bench-real clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Quantizes the embedded toy Grok to int4 and compares it with bf16.
demo: install
	$(BIN)/grokquant quantize recipes/toy-int4.yaml
	$(BIN)/grokquant eval runs/toy-int4 --reference toy

# Two processes, a file of tests in either: with the threads of torch they would be in each other's way.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# A million mutated headers for each reader of files from strangers: a minute on two cores.
fuzz: install
	$(BIN)/python tests/fuzz.py

# The pages of reports in a headless Chromium, the one on the path or $CHROMIUM: a minute.
test-browser: install
	$(BIN)/python -m pytest -m browser

# Kills and starves a small run at every step: half an hour.
test-kill: install
	$(BIN)/python -m pytest -m kill

# Runs under torchrun on 1 to 8 ranks, some of them killed or cut off: a quarter of an hour.
test-ranks: install
	$(BIN)/python -m pytest -m ranks

# Kernels for GPUs without one: run by Triton's interpreter, then compiled for A100 and H100. Triton
# comes with torch's CUDA builds only, and takes 800 MB.
test-kernels: install $(READERS)/triton/installed
	TRITON_INTERPRET=1 PYTHONPATH=$(abspath $(READERS)/triton) $(BIN)/python -m pytest -m kernels
	PYTHONPATH=$(abspath $(READERS)/triton) $(BIN)/python -m pytest -m kernels

$(READERS)/triton/installed: tests/readers/requirements-triton.txt
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

# Has llama.cpp and gptqmodel load what we write, and hqq, torchao and Quark write what we read, each
# from an environment of its own. Building them takes half an hour and 8 GB the first time.
test-readers: install $(foreach name,llama-cpp gptqmodel hqq torchao quark,$(READERS)/$(name)/installed)
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

# The peers of eval/compare/compare.py, each in an environment of its own: 5 GB. torch's CPU build
# must be in reach of pip, as for test-engines.
PEERS := .peers
peers: $(addprefix $(PEERS)/,$(addsuffix /installed,gptqmodel llm-compressor auto-round hqq llama-cpp))

# llama.cpp's own programs: a quarter of an hour of cmake.
$(PEERS)/llama-cpp/installed: eval/compare/peers/requirements-llama-cpp.txt
	$(PYTHON) -m pip download --quiet --no-deps --no-binary :all: -d $(@D) -r $<
	tar -xzf $(@D)/*.tar.gz -C $(@D)
	cmake -S $(@D)/*/vendor/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF \
		-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF
	cmake --build $(@D)/build --target llama-quantize llama-imatrix
	touch $@

$(PEERS)/%/installed: eval/compare/peers/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
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
	for name in quality rtn_kernel llama_cpp_grids hessian gptq_solver planning import_cost ranks; do \
		$(BIN)/python eval/bench/$$name.py || exit 1; done

bench-real: install
	for name in weight_only lossless streamed_eval gptq_expert descent; do \
		$(BIN)/python eval/bench/$$name.py || exit 1; done

clean:
	rm -rf .venv .readers .peers runs notebooks/runs build *.egg-info
