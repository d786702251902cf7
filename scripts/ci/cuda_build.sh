#!/bin/sh
# Builds the extension with its CUDA kernels by pip, as a user does, and checks what it says without a device. The build
# is not optimised, which takes half the time, because aot.py checks the code. The library is kept by the hash of its
# sources.
set -eu
python=$1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cache=${XDG_CACHE_HOME:-$HOME/.cache}/dmfast/aot
made_of() {
  "$python" -c 'import cuda_compiler, sys; print(cuda_compiler.compiler_version(), sys.version)'
  git ls-files -z csrc setup.py cuda_compiler.py build_backend.py pyproject.toml scripts/ci/cuda_build.sh | xargs -0 cat
}
kept=$cache/_C-$(made_of | sha256sum | cut -c 1-16).so
if [ ! -f "$kept" ]; then
  mkdir -p "$out/tree" "$cache"
  git ls-files -z | tar --null -T - -c | tar -x -C "$out/tree"
  NVCC_APPEND_FLAGS=-Xptxas=-O0 DMFAST_CXXFLAGS=-O0 DMFAST_BUILD=cuda DMFAST_CUDA_ARCHS=90 "$python" -m pip install -q \
    --no-deps --no-build-isolation --target "$out/built" "$out/tree" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
  cp "$out"/built/dmfast/_C*.so "$kept"
fi

mkdir "$out/site"
cp -r dmfast "$out/site/"
rm -f "$out"/site/dmfast/_C*.so
cp "$kept" "$out/site/dmfast/_C.so"
ldd "$kept" >"$out/needs"
if grep -E 'libcudart|libcuda\.|libtorch|libc10|not found' "$out/needs"; then
  echo "the extension is to need no library of CUDA's or torch's" >&2
  exit 1
fi
# hides the devices of the machine
cd "$out" && CUDA_VISIBLE_DEVICES= PYTHONPATH="$out/site" "$python" -m dmfast doctor >"$out/said"
grep -E '^ *cuda .*compiled, no device' "$out/said" || { cat "$out/said" >&2; exit 1; }
