#!/bin/sh
# The PTX that nvcc makes of csrc/cuda/loss.cu, executed by the numpy machine of tests/ptx, against the oracle.
# Then bugs of tests/native/bugs, which must be caught. PTX is kept in build/ptx, by the hash of the sources.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the bugs are tried elsewhere

here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export DMFAST_PTX="$here/build/ptx" OMP_NUM_THREADS=1

. scripts/ci/caught.sh
bring_nvcc "$python"

proof() { # directory of the sources, options
  tree=$1
  shift
  (cd "$tree" && PYTHONPATH="$here:$tree/tests/ptx" "$python" -m pytest tests/ptx/proof.py -q -p no:cacheprovider "$@")
}

proof "$here"
caught fence_before "no fence before" proof -k fences
caught fence_before "FAILED .*any_order" proof -k any_order
caught fence_after "no fence after" proof -k fences
caught fence_after "FAILED .*any_order" proof -k any_order
caught wrong_sign "FAILED .*known" proof -k "known and 37"
