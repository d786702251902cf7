#!/bin/sh
# Runs the kernel tests with kernels under AddressSanitizer and UBSan. -DDMF_NO_CLONES is needed, because the resolvers
# of target_clones run before a sanitizer can. So this also tests the baseline instruction set, as on a machine without
# AVX2. A second build without sanitizers looks for errors that only optimised code has there. The tests of the formula
# in 50 digits are left out: they take long in Python, and test_objectives runs the same C++. So are those of the accuracy
# of long sequences and of torch's products, which read and write as shorter ones do.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the tests run elsewhere
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$python" -m pip install -q -c constraints.txt 'setuptools>=77' 'pybind11>=2.13'

build() { # directory, flags
  DMFAST_BUILD=cpu DMFAST_CXXFLAGS="-DDMF_NO_CLONES $2" "$python" setup.py -q build --build-base "$1" --build-lib "$1/lib"
}

suite() { # directory of a build, tests and options
  export PYTHONPATH="$1/lib"
  shift
  "$python" -c 'import dmfast; from dmfast.kernels import cpu; print(dmfast.__file__, dmfast.backends()["cpu"].detail)
assert cpu.instruction_set() == "baseline"'
  "$python" -m pytest -p no:cacheprovider "$@"
}

. scripts/ci/caught.sh
build "$out/optimised" ""
build "$out/sanitized" "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1 -fno-omit-frame-pointer"
cd tests
suite "$out/optimised" test_x87.py test_kernels.py -k "x87 or vocabularies"
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0
# fp16 differs from bf16 only in how a number is read and written; vocabularies and special logits show this.
suite "$out/sanitized" test_kernels.py test_shards.py test_errors.py test_sample.py test_linear.py \
  -k "not million and not under_compile and not formula and not 1024_tokens and not thousandth and not size_of_a_model and not ieee and not (fp16 and not (vocabularies or special_logits)) and $errors_of_kernels"
