#!/bin/sh
# Runs the Triton kernels in Triton's interpreter on CPU tensors. The kernel suite compares them with the fp64 oracle at
# reduced sizes, because a row takes milliseconds there. tests/interpreter.py corrects the interpreter's errors. Then
# each seeded bug of tests/native/bugs must be caught.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1") # absolute: the tests run elsewhere
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
start=$(date +%s)
said() { echo "$(($(date +%s) - start)) s: $*"; }

suite() { # directory of a tree, tests and options
  tree=$1
  shift
  (cd "$tree/tests" && PYTHONPATH="$tree:$tree/tests" DMFAST_SYNC_CHECKS=1 OMP_NUM_THREADS=1 \
    "$python" -m pytest -q -p no:cacheprovider -p interpreter --rootdir "$tree" "$@")
}

. scripts/ci/caught.sh

suite "$(pwd)" test_triton.py \
  -k "not opcheck and not costs_its and not under_compile or under_compile and (gdc or chunk) or costs_its_sequence and gdc and False and (nan or label or token) or costs_its_token and (nan and gdc or 1e and dpg)"
said "faults, selection"
suite "$(pwd)" test_shards.py -k "fused and (fp32 and (plain-packed64 or capped-sliced) or bf16 and plain-contiguous or not halves)"
said "halves of a vocabulary"
suite "$(pwd)" test_kernels.py \
  -k "vocabularies and 127 and (contiguous or unaligned and bf16 or packed64 and fp32) or vocabularies and 4096 and sliced or empty_and_short and mean and new and (contiguous-3-0 or packed32-1-1 or contiguous-0-4)"
said "layouts and vocabularies"
suite "$(pwd)" test_kernels.py \
  -k "special_logits and (middle or scattered or rising) and inplace and 1.7 and bf16 or special_logits_under_a_softcap and scattered and fp32 or label_gradient and 30-600 or later_block and 2.7"
said "special logits"
suite "$(pwd)" test_kernels.py -k "test_objectives and bf16 and off-policy and gdc or edges_of_fp32 and dpg or upstream and bf16 and new and 0.37 or scaled_or_capped and bf16 and 1.7"
suite "$(pwd)" test_kernels.py -k "50257 and vocabularies and unaligned and bf16"
suite "$(pwd)" test_kernels.py -k "narrow_gradients and (127-contiguous-bf16 or 127-unaligned-fp16) or may_not_be_written"
said "objectives, options, a large row, gradients narrower than logits"
suite "$(pwd)" test_entropy.py \
  -k "layouts and (sliced or packed64) and bf16 and new or special and 1.7 and (scattered or rising) and bf16 or reductions and 5.0 and none and fp32 and gdc or halves and fused and fp32 or fault or linear and dpg and mean-3"
said "the entropy bonus"
suite "$(pwd)" test_token_weight.py \
  -k "layouts and (sliced and bf16 or packed64 and fp32 and own) and new or special and scattered and bf16 or grad_output and sum and bf16 or linear and packed-3 or may_not_be and kernels or clip and kernels"
said "weights of tokens"
suite "$(pwd)" test_linear.py test_sample.py -k "test_dtypes and gdc or thousandth and 48 and GPU or bad_place or tails and 1.0 and bf16 or bad_row or strides and not wrong"
said "hidden states, sampling"

caught triton_tail "^FAILED " suite -x test_kernels.py -k "vocabularies and 127 and contiguous and fp32"
caught triton_rounding "^FAILED " suite -x test_kernels.py -k "label_gradient and 30-600-fp32"
caught triton_bonus "^FAILED " suite -x test_entropy.py -k "special and 1.7 and scattered and bf16"
caught triton_shifted_weight "^FAILED " suite -x test_token_weight.py -k "linear and packed-3 and dpg and not compile"
said "seeded bugs"
