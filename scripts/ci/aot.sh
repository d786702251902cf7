#!/bin/sh
# Runs aot.py on the kernels for one architecture of NVIDIA's and one of AMD's, and compares what it finds with
# benchmarks/results/aot.json, which `make aot-all` writes for all of them. Then aot.py must catch the seeded bugs of
# tests/native/bugs. The models of roofline.py and stated.py, from the same figures, must equal those of docs/gpu.md.
# Then the extension is built as a user builds it. If there is no nvcc, PyPI's CUDA compiler is installed. Compiled code
# is kept in ~/.cache by the hash of its source.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
. scripts/ci/caught.sh
bring_nvcc "$python"

aot() { # directory of a tree, options
  tree=$1
  shift
  (cd "$tree" && "$python" "$here/scripts/ci/aot.py" "$@")
}

start=$(date +%s)
said() { echo "$(($(date +%s) - start)) s: $*"; }

# The kernels for fp32 alone have this bug too.
aot_of_fp32() {
  one_dtype "$1"
  aot "$@"
}

aot "$here" --archs 90 gfx942 --kept benchmarks/results
said "all kernels"
caught spill "sample_rows.*: spills" aot --only cuda/sample --archs 90
caught registers "write_rows.*registers leave room for" aot --only "triton/write_rows<bf16>" --archs 90
caught sunk_load "write_rows.*behind its first special-function instruction" aot_of_fp32 --only cuda/loss --archs 90
caught narrow "write_rows.*: no 128-bit" aot --only triton/write --archs 90
caught triton_wait "a load is under way at the barrier" aot --only "amd/score_rows<fp32, known weight>" --archs gfx942
said "seeded bugs"
"$python" scripts/ci/roofline.py docs/gpu.md build/gpu.md
PYTHONPATH="$here" "$python" scripts/ci/stated.py docs/gpu.md build/stated.md
said "roofline, and what others state"
sh scripts/ci/cuda_build.sh "$python"
said "as a user builds it"
