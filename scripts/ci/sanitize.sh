#!/bin/sh
# The kernel tests with kernels under AddressSanitizer and UBSan. -DDMF_NO_CLONES: the resolvers of target_clones run
# before a sanitizer can; so this is also the run on the baseline instruction set, as on a machine without AVX2.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the tests run elsewhere
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$python" -m pip install -q -c constraints.txt 'setuptools>=77' 'pybind11>=2.13'
DMFAST_BUILD=cpu DMFAST_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1 -fno-omit-frame-pointer -DDMF_NO_CLONES" \
  "$python" setup.py -q build --build-base "$out/build" --build-lib "$out/lib"
cd tests
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$out/lib"
"$python" -c 'import dmfast; from dmfast.kernels import native; print(dmfast.__file__, dmfast.backends()["cpu"].detail)
assert native.instruction_set() == "baseline"'
"$python" -m pytest -p no:cacheprovider test_kernels.py test_errors.py test_sample.py test_linear.py -k "not million and not under_compile"
