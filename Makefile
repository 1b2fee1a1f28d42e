# make demo   install into .venv and show a MoE that is larger than its memory
# make test   install into .venv and run the tests
# make lint   install into .venv and run ruff and mypy
# make bench-smoke   the ratios that matter, on small models, without peers, in about four minutes
# make bench-peers   install who we are compared with (builds llama.cpp for this CPU: ten minutes)
# make bench         everything beside the peers, with memory limits (needs root; three quarters of an hour)
#
# The install is done once and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
BIN    := $(VENV)/bin

.PHONY: demo test lint bench bench-smoke bench-peers clean

demo: $(STAMP)
	$(BIN)/understudy demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-smoke: $(STAMP)
	$(BIN)/python bench/decode.py --smoke
	$(BIN)/python bench/prefill.py --smoke
	$(BIN)/python bench/start.py --smoke
	$(BIN)/python bench/overhead.py --smoke

bench: $(STAMP)
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/prefill.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/serve.py

# From source and for this CPU: a build for every CPU would not be llama.cpp at its best.
bench-peers: $(STAMP)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	    -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF" \
	    $(BIN)/python -m pip install -c constraints.txt --no-binary llama-cpp-python -e '.[peers]'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
