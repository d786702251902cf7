#!/bin/sh
# aot.py on the kernels as they are, whose table goes to benchmarks/results/aot.md, then on seeded bugs of
# tests/native/bugs, which must be caught. Brings PyPI's CUDA compiler where there is no nvcc.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
if [ "$("$python" -c 'import build_backend as b; print(b.find_nvcc() or "")')" = "" ]; then
  "$python" -m pip install -q $("$python" -c 'import build_backend as b; print(*b.CUDA_COMPILER)')
fi

aot() { # directory of a tree, options
  tree=$1
  shift
  (cd "$tree" && "$python" "$here/scripts/ci/aot.py" "$@")
}

caught() { # name, expected message, options
  name=$1 message=$2
  shift 2
  mkdir -p "$out/$name"
  cp -r csrc dmfast tests build_backend.py "$out/$name/"
  (cd "$out/$name" && patch -s -p1 <"tests/native/bugs/$name.patch")
  if aot "$out/$name" "$@" >"$out/$name/log" 2>&1; then
    echo "the seeded bug $name was not caught" >&2
    exit 1
  fi
  grep -q "$message" "$out/$name/log" || { echo "$name failed otherwise:" >&2; tail -30 "$out/$name/log" >&2; exit 1; }
  echo "caught: $name"
}

aot "$here" --table benchmarks/results/aot.md
caught spill "write_rows.*: spills" --only cuda/loss --archs 90
caught narrow "write_rows.*: no 128-bit" --only triton/write --archs 90
