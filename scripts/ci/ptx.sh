#!/bin/sh
# The PTX that nvcc makes of csrc/cuda/loss.cu, executed by the numpy machine of tests/ptx, against the oracle.
# Then bugs of tests/native/bugs, which must be caught. PTX is kept in build/ptx, by the hash of the sources.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the bugs are tried elsewhere

here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export DMFAST_PTX="$here/build/ptx" OMP_NUM_THREADS=1

if ! "$python" -c 'import build_backend, sys; sys.exit(build_backend.find_nvcc() is None)'; then
  "$python" -m pip install -q --target "$out/nvcc" \
    $("$python" -c 'import build_backend; print(*build_backend.CUDA_COMPILER)')
  export CUDA_HOME="$(echo "$out"/nvcc/nvidia/cu[0-9]*)"
fi

proof() { # directory of the sources, options
  tree=$1
  shift
  (cd "$tree" && PYTHONPATH="$here:$tree/tests/ptx" "$python" -m pytest tests/ptx/proof.py -q -p no:cacheprovider "$@")
}

caught() { # bug, tests, what is then said
  mkdir -p "$out/$1"
  cp -r csrc tests build_backend.py "$out/$1/"
  (cd "$out/$1" && patch -s -p1 <"tests/native/bugs/$1.patch")
  if proof "$out/$1" -k "$2" >"$out/$1/log" 2>&1; then
    echo "the seeded bug $1 was not caught" >&2
    exit 1
  fi
  grep -q "$3" "$out/$1/log" || { echo "$1 failed otherwise:" >&2; tail -30 "$out/$1/log" >&2; exit 1; }
  echo "caught: $1"
}

proof "$here"
caught fence_before fences "no fence before"
caught fence_before any_order "FAILED .*any_order"
caught fence_after fences "no fence after"
caught fence_after any_order "FAILED .*any_order"
caught wrong_sign "known and 37" "FAILED .*known"
