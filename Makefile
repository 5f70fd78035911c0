# make demo   the main job on handwritten digits; prints where the report is
# make test   all tests
# make test-runtime   those that need no torch, on the oldest and the newest Python at hand
# make web   the JavaScript package, with Node.js
# make docs   the documentation's site, in site/
# make benchmarks   all figures of benchmarks/README.md, on a machine that does nothing else
# All make what they need first, in .venv (and .venv-runtime, which has no torch), and work offline after that.

PYTHON ?= python3
VENV := .venv
RUNTIME := .venv-runtime
BIN := $(VENV)/bin
DEMO ?= demo

# The build of torch to install. A machine without an NVIDIA GPU gets the CPU build, which is ten times smaller: from
# the index pip is set up for where that has one, else from PyTorch's own. Override with TORCH=torch==2.13.0.
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifneq ($(shell uname -s),Linux)
TORCH ?= torch==$(TORCH_VERSION)
else ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==$(TORCH_VERSION)
else
TORCH ?= torch==$(TORCH_VERSION)+cpu
endif

# Of pytest. Two processes, each of which takes the tests of a file together, since they share what is slow to make.
# With ARGS of your own it is one process: make test ARGS="-k rollout"
ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

SOURCES := $(wildcard piflow_edge/kernels/*.h piflow_edge/kernels/*.cpp piflow_edge/kernels/*.py)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean benchmarks docs web

demo: $(VENV)/.installed
	$(BIN)/piflow-edge demo --out $(DEMO) --emoji-sources benchmarks/state/emoji-teacher benchmarks/data/noto_emoji_64.npz

test: $(VENV)/.tools $(RUNTIME)/.installed
	@rm -rf build .wheel
	@$(PIP) wheel -q --no-index --no-deps --no-build-isolation -w .wheel .
	@$(RUNTIME)/bin/python -m pip --disable-pip-version-check install -q --no-index --no-deps --force-reinstall .wheel/*.whl
	OMP_NUM_THREADS=1 PIFLOW_EDGE_RUNTIME_PYTHON=$(abspath $(RUNTIME))/bin/python $(BIN)/python -m pytest $(ARGS)

benchmarks: $(VENV)/.tools
	$(BIN)/python -m benchmarks.run_all --demo $(DEMO)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf .types
	@mkdir -p .types
	@cp -R piflow_edge .types/
	@cp -R engines export .types/piflow_edge/
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# From the wheel: in the source tree engines/ and export/ lie beside the package they are part of.
docs: $(VENV)/.tools
	$(PIP) install -q --no-build-isolation -e '.[docs]'
	@rm -rf build .wheel
	@$(PIP) wheel -q --no-index --no-deps --no-build-isolation -w .wheel .
	@$(PIP) install -q --no-index --no-deps --target build/package .wheel/*.whl
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q
	@echo site/index.html

clean:
	rm -rf $(VENV) $(RUNTIME) build .wheel .types site *.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q "setuptools>=77" wheel
	$(PIP) install -q "$(TORCH)" || $(PIP) install -q --index-url $(TORCH_CPU_INDEX) "$(TORCH)" || { \
	  echo "There is no '$(TORCH)' for this machine's Python. Try another: make PYTHON=python3.11 ..., or take the" >&2; \
	  echo "default build, which may bring several GB of CUDA packages: make TORCH=torch==$(TORCH_VERSION) ..." >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) install -q --no-build-isolation -e '.[cpu,text,train]'
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -q --no-build-isolation -e '.[cpu,text,train,test]'
	@touch $@

$(RUNTIME)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(RUNTIME)
	@rm -rf build .wheel
	$(PIP) wheel -q --no-deps --no-build-isolation -w .wheel .
	set -- .wheel/*.whl; $(RUNTIME)/bin/python -m pip --disable-pip-version-check install -q "$$1[cpu]" "pyinstaller>=6.10"
	@touch $@

# The JavaScript package, compiled into what is committed. Without Node.js its tests are left out.
WEB := piflow_edge/web

web: $(WEB)/node_modules/.installed
	cd $(WEB) && node_modules/.bin/tsc -p .

$(WEB)/node_modules/.installed: $(WEB)/package-lock.json
	cd $(WEB) && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# The small networks that ship with the package: the digits teacher, the classifier FID is measured with, and the bundle
# of a student for one call, made last by what is committed then.
.PHONY: assets
assets: $(VENV)/.installed
	$(BIN)/python -m piflow_edge.export.feature_extractor --out piflow_edge/assets/digits_features.onnx
	$(BIN)/piflow-edge train-teacher --data digits --out runs/teacher --weights-only
	rm -rf piflow_edge/distill/assets/digits_teacher
	mkdir piflow_edge/distill/assets/digits_teacher
	cp runs/teacher/checkpoint.json runs/teacher/*.safetensors piflow_edge/distill/assets/digits_teacher
	$(BIN)/piflow-edge distill --nfe 1 --out runs/digits
	$(BIN)/python -c "from pathlib import Path; from piflow_edge.commands.demo import export_digits; \
	  from piflow_edge.distill.loop.checkpoint import load_checkpoint; \
	  export_digits(load_checkpoint(Path('runs/digits'), kind='student'), Path('piflow_edge/assets/digits'))"

# The wheel without torch, on the oldest and the newest Python of this machine; see the script.
.PHONY: test-runtime
test-runtime:
	tests/without_torch.sh

# The runtime on aarch64: on such a machine, else by emulation; see the script.
.PHONY: test-aarch64
test-aarch64:
	tests/aarch64.sh
