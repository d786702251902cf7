#!/bin/sh
# Executes the PTX that nvcc makes of csrc/cuda/loss.cu and that Triton makes of dmfast/kernels/triton in the numpy
# emulator of tests/ptx, and compares it with the oracle. Then bugs of tests/native/bugs must be caught. PTX is kept in
# build/ptx by the hash of the sources.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the bugs are tried elsewhere

here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export DMFAST_PTX="$here/build/ptx" OMP_NUM_THREADS=1

. scripts/ci/caught.sh
bring_nvcc "$python"

of_nvcc() { # directory of the sources, options
  tree=$1
  shift
  (cd "$tree" && PYTHONPATH="$here:$tree/tests/ptx" "$python" -m pytest tests/ptx/proof.py -q -p no:cacheprovider "$@")
}

of_fp32() {
  one_dtype "$1"
  of_nvcc "$@"
}

of_triton() {
  tree=$1
  shift
  (cd "$tree" && PYTHONPATH="$tree:$tree/tests:$tree/tests/ptx" \
    "$python" -m pytest -p emulated tests/ptx/triton_proof.py -q -p no:cacheprovider "$@")
}

(
  of_nvcc "$here"
  caught fence_before "no fence before" of_fp32 -k fences
  caught fence_before "FAILED .*any_order" of_fp32 -k any_order
  caught fence_after "no fence after" of_fp32 -k fences
  caught fence_after "FAILED .*any_order" of_fp32 -k any_order
  caught wrong_sign "FAILED .*known" of_fp32 -k "known and 37"
) &
nvcc=$!
(
  of_triton "$here"
  caught triton_tail "FAILED .*37" of_triton -k "forward and new and 37"
  caught triton_wide "misaligned access of 16 bytes" of_triton -k "forward and new and 71"
  caught triton_global "Global variable NAN has changed" of_triton -k "forward and new and 37"
  caught triton_barriers "FAILED .*several_warps" of_triton -k "several_warps and 6151"
) >"$out/triton.log" 2>&1 &
triton=$!
failed=0
wait $nvcc || failed=1
wait $triton || failed=1
cat "$out/triton.log"
exit $failed
