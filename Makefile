# On a fresh clone, with python3 >= 3.10 and g++ (nvcc is used if there), each of these does all its own set-up:
#   make demo    SFT, reward model and PPO on a small task     (ARGS="--help" for its options)
#   make test    the whole test suite                          (ARGS="tests/test_gae.py" for a part)
#   make mutants wrong changes, each seen by a test           (a quarter of an hour; ARGS=NAME for some)
#   make bench   ours and its peers, a selection in minutes    (make bench-full: everything, and keeps the rows)
#   make fuzz    each property of each op on 20,000 inputs     (hours; EXAMPLES=2000 for fewer, ARGS=--save to keep the counts)
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
EXAMPLES ?= 20000

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS     := $(VENV)/.peers
# --no-compile: most modules are never imported, and the others are compiled when they are
PIP       := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# with a compiler, a kernel that does not compile is an error; without one, the reference implementation runs
ifneq ($(shell command -v $(CXX) 2>/dev/null),)
export PPO_EXT_REQUIRE_NATIVE ?= 1
endif

.PHONY: demo test fuzz mutants build lint format bench bench-full info clean

demo: build
	$(BIN)/python -m ppo_ext demo $(or $(ARGS),--overwrite)

test: build
	PPO_EXT_REQUIRE_ORACLE=1 $(BIN)/python -m pytest -q $(ARGS)

fuzz: build
	PPO_EXT_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m tests.property_counts -v $(ARGS)

# without a GPU there is no need to wait for the CUDA kernels
bench bench-full: export PPO_EXT_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)

mutants: build
	$(BIN)/python -m tests.mutants --save $(ARGS)

bench: build $(PEERS)
	$(BIN)/python -m bench $(ARGS)

bench-full: build $(PEERS)
	$(BIN)/python -m bench --full --save $(ARGS)
	$(BIN)/python -m bench.render

info: build
	$(BIN)/python -m ppo_ext info

build: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

CXX_FILES = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ppo_ext needs python >= 3.10, this is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and what the tests need into $(VENV), once"
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation --editable '.[test,demo,lint]'
	touch $@

# what ours is compared with; nothing else needs it, and a peer that cannot be had is a row that says so
$(PEERS): $(INSTALLED)
	-$(PIP) 'ppo_ext[bench]'
	$(BIN)/python -m bench.peers --download
	touch $@

clean:
	rm -rf $(VENV) build dist ppo_ext.egg-info ppo_ext/_C_*.so ppo_ext/_build_info.json
