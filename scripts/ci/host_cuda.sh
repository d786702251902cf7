#!/bin/sh
# Compiles the CUDA kernels of csrc/cuda by g++ on top of tests/native/shim.h and runs them on the host as the module
# dmfast._C, which treats CPU tensors like those of a device. The kernel suite runs under ASan and UBSan.
# Then each bug of tests/native/bugs must be caught.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the tests run elsewhere

"$python" -m pip install -q -c constraints.txt 'pybind11>=2.13'
here=$(pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
[ "$(uname -m)" != x86_64 ] || no_mmx=-mno-mmx
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"

# Builds the current directory, except for objects that exist already. The CPU kernels are not under test here, so they
# are neither optimised nor sanitized, which compiles them in a fraction of the time.
build() { # directory, flags
  mkdir -p "$1/lib"
  cp -r dmfast "$1/lib/"
  rm -f "$1"/lib/dmfast/_C*.so
  flags="-std=c++17 -fPIC -Wall -Wextra -Wno-unknown-pragmas -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast
    ${no_mmx:-} -fvisibility=hidden -DDMF_NO_CLONES -DDMF_CUDA -DDMF_SHIM -Itests/native -Icsrc
    $("$python" -c 'import pybind11, sysconfig; print("-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"])')"
  for source in csrc/bindings.cpp csrc/cpu/*.cpp csrc/cuda/loss.cu csrc/cuda/sample.cu tests/native/shim.cpp; do
    object="$1/$(echo "$source" | tr / _).o"
    case $source in csrc/cpu/*) options=-O0 ;; *) options=$2 ;; esac
    [ -f "$object" ] || g++ $flags $options -x c++ -c "$source" -o "$object"
    set -- "$@" "$object"
  done
  target="$1/lib/dmfast/_C.so"
  link=$2
  shift 2
  g++ -shared -fopenmp $link "$@" -o "$target"
}


suite() { # directory of a build, tests and options
  build=$1
  shift
  (cd "$here/tests" && PYTHONPATH="$build/lib" DMFAST_SYNC_CHECKS=1 "$python" -m pytest -q -p no:cacheprovider "$@")
}

# -s: when a sanitizer ends the process, the output that pytest has captured is lost
sanitized() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 suite "$@" -s
}

. scripts/ci/caught.sh
# Runs the tests on the build of a copy whose csrc/cuda differs from that of another build, with kernels of one dtype.
seeded() { # copy, the other build, flags, suite or sanitized, tests and options
  copy=$1 like=$2 flags=$3 how=$4
  shift 4
  mkdir "$copy/build"
  cp "$like"/*.o "$copy/build/"
  rm "$copy/build/csrc_cuda_loss.cu.o" # the tests of the bugs run no kernel of sample.cu
  one_dtype "$copy" && (cd "$copy" && build "$copy/build" "$flags") && SHIM_SEED=1 $how "$copy/build" -x "$@"
}

start=$(date +%s)
said() { echo "$(($(date +%s) - start)) s: $*"; }
# fp16 differs from bf16 only in how a number is read and written; vocabularies and special logits show this. log pi of
# 1,024 tokens is measured in both. From hidden states, the kernels are those of logits, whose tests have every objective.
small="not 50257 and not 32003 and not 1024_tokens and not million and not under_compile and not formula and not threads"
small="$small and not size_of_a_model and not (test_every_objective and not gdc)"
small="$small and $errors_of_kernels"
small="$small and not (fp16 and not (vocabularies or special_logits or thousandth and 1024-6.0 and GPU))"

build "$out/plain" "-O2"
SHIM_SEED=1 suite "$out/plain" test_cuda.py test_kernels.py test_entropy.py test_token_weight.py test_shards.py test_sample.py \
  test_linear.py test_errors.py \
  -k "$small and not own_interval and not num_sequences"
said "the suite"
# the few rows of a test are scored in parts, unless the device has one multiprocessor
SHIM_SEED=2 suite "$out/plain" test_kernels.py -k "50257 and vocabularies and contiguous"
SHIM_SEED=2 SHIM_MULTIPROCESSORS=1 suite "$out/plain" test_kernels.py -k "50257 and log_sum_exp and not fp16"
SHIM_SEED=3 SHIM_SHARED=12000 suite "$out/plain" test_cuda.py test_kernels.py -k "any_shape or empty or (4096 and vocabularies) or (test_cuda and not under_compile)"
SHIM_SEED=4 suite "$out/plain" test_cuda.py test_kernels.py -k "any_shape or (test_cuda and not under_compile)"
said "large rows, in parts and by one block, other schedules, rows read twice"

build "$out/sanitized" "$sanitizers"
SHIM_SEED=5 sanitized "$out/sanitized" test_cuda.py test_kernels.py test_sample.py \
  -k "$small and (test_cuda or (vocabularies and (127 or 4096)) or any_shape or empty or beyond or strides or tails or bad_row)"
said "sanitizers"

caught missing_barrier "^FAILED test_kernels" seeded "$out/plain" "-O1" suite test_kernels.py -k "vocabularies and 1000 and fp32"
caught truncation "^FAILED .*rounded_to_nearest" seeded "$out/plain" "-O1 -DDMF_ONLY=bf16" suite test_kernels.py \
  -k "test_gradients_are_rounded_to_nearest and dtype0"
caught ones "^FAILED .*log_sum_exp" seeded "$out/plain" "-O1" suite test_kernels.py -k "log_sum_exp and peaked and 1000 and fp32"
caught lost_part "^FAILED test_cuda.*in_parts" seeded "$out/plain" "-O1" suite test_cuda.py -k "in_parts and dense"
caught shifted_weight "^FAILED test_token_weight" seeded "$out/plain" "-O1" suite test_token_weight.py \
  -k "layouts and packed64 and gdc and fp32"
caught out_of_bounds "AddressSanitizer: heap-buffer-overflow" seeded "$out/sanitized" "$sanitizers" sanitized \
  test_kernels.py -k "empty_and_short and contiguous-1-1 and fp32"
said "seeded bugs"
