#!/bin/sh
# aot.py on the kernels as they are, whose table goes to benchmarks/results/aot.md, then on seeded bugs of
# tests/native/bugs, which must be caught. Brings PyPI's CUDA compiler where there is no nvcc.
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

aot "$here" --table benchmarks/results/aot.md
caught spill "write_rows.*: spills" aot --only cuda/loss --archs 90
caught narrow "write_rows.*: no 128-bit" aot --only triton/write --archs 90
