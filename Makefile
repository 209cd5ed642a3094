# Thin targets over pip and a virtual environment. Nothing else needs to be installed: no compiler, no GPU.
#
#   make demo     run the embedded federation             make test     lint, and all tests
#   make check    lint, and the tests of what has         make soak     the long tests, for hours
#                 changed, in less than a minute          make lint     ruff and mypy
#   make docs     the documentation as a site,            make clean    remove the environment
#                 in build/site
#
# PYTEST chooses among the tests: make test PYTEST="tests/fedllm -k ledger"
#
# TORCH_INDEX chooses where PyTorch comes from. Empty: the configured package index, unless that would bring CUDA
# builds to a machine without an NVIDIA GPU; then PyTorch's own CPU index. On a GPU machine the configured index
# (PyPI) already gives the CUDA build; another CUDA version: TORCH_INDEX=https://download.pytorch.org/whl/cu128
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test check soak lint docs clean install

demo: $(VENV)/demo.stamp
	$(VENV)/bin/fedllm simulate $(OVERRIDES)

# A file of tests runs in one process, for the sake of its fixtures; tests/conftest.py pins the processes' threads.
PARALLEL := -m pytest -n logical --dist loadfile

test: $(VENV)/dev.stamp lint
	$(VENV)/bin/python $(PARALLEL) $(PYTEST)

check: $(VENV)/dev.stamp lint
	$(VENV)/bin/python -m tests.quick

# Pytest's last line says how long it took.
soak: $(VENV)/dev.stamp
	FEDLLM_SOAK=1 $(VENV)/bin/python $(PARALLEL) -m soak --timeout 7200 --durations 20 $(PYTEST)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Material's banner is about an end of life in 2027, and not about these pages.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

install: $(VENV)/demo.stamp

$(VENV)/torch.stamp: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && ! command -v nvidia-smi >/dev/null && \
	   $(PIP) install --dry-run --ignore-installed --no-deps --quiet --report - $(TORCH) | grep -Eq '"(nvidia|cuda)-'; \
	then index=$(CPU_INDEX); echo "no NVIDIA GPU here: taking PyTorch from $$index"; fi; \
	$(PIP) install --quiet --no-deps $(TORCH) $${index:+--index-url $$index}
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet --editable . --constraint constraints.txt
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(PIP) install --quiet --editable '.[docs]' --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
