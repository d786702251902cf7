#!/bin/sh
# Checks loads, stores and races of the CUDA kernels on the host (tests/native/trace.cpp). Then the fence that the
# counters of blocks need is removed, which must be found.
set -eu
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# Builds and runs the contents of a directory.
trace() { # directory, where to
  mkdir "$2"
  (
    cd "$1"
    flags="-std=c++17 -O1 -Wall -Wextra -Wno-unknown-pragmas -fno-math-errno -DDMF_NO_CLONES -DDMF_CUDA -DDMF_SHIM
      -Itests/native -Icsrc"
    for source in csrc/cuda/loss.cu csrc/cuda/sample.cu; do # -Wno-tsan: the fences are the shim's
      g++ $flags -fsanitize=thread -Wno-tsan -x c++ -c "$source" -o "$2/$(basename "$source").o"
    done
    g++ $flags tests/native/trace.cpp tests/native/shim.cpp "$2"/*.o -o "$2/trace"
  )
  for seed in 1 2; do
    SHIM_SEED=$seed "$2/trace" || return 1
  done
}

trace "$(pwd)" "$out/as_is"

. scripts/ci/caught.sh
seeded() { trace "$1" "$1/traced"; }
caught dropped_fence "^RACE" seeded
