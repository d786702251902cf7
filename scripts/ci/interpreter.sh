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
  -k "not opcheck and not costs_its and not under_compile and not (out_of_order and (starts1 or starts2 or starts3)) or one_graph and gdc or check_too and gdc and True or chunk and True or costs_its_sequence and gdc and False and (nan or label) or costs_its_token and nan and gdc"
said "faults, selection"
suite "$(pwd)" test_shards.py -k "fused and (plain-packed64 and fp32 or plain-contiguous and bf16 or half_holds or whole_vocabulary)"
said "halves of a vocabulary"
suite "$(pwd)" test_kernels.py \
  -k "vocabularies and 127 and (contiguous and fp32 or unaligned and bf16 or packed64 and fp32) or vocabularies and 4096 and sliced and fp16 or empty_and_short and mean and new and (contiguous-3-0 or packed32-1-1 or contiguous-0-4)"
said "layouts and vocabularies"
suite "$(pwd)" test_kernels.py \
  -k "special_logits and (scattered or rising) and inplace and 1.7 and bf16 or special_logits_under_a_softcap and scattered and fp32 or label_gradient and 30-600 and not fp16 or later_block and 2.7"
said "special logits"
suite "$(pwd)" test_kernels.py -k "test_objectives and bf16 and off-policy and gdc or edges_of_fp32 and dpg or upstream and bf16 and new and 0.37 and (mean-dpg or none-gdc) or scaled_or_capped and bf16 and 1.7"
suite "$(pwd)" test_kernels.py -k "50257 and vocabularies and unaligned and bf16"
suite "$(pwd)" test_kernels.py -k "narrow_gradients and (127-contiguous-bf16 or 127-unaligned-fp16) or may_not_be_written"
said "objectives, options, a large row, gradients narrower than logits"
suite "$(pwd)" test_entropy.py \
  -k "layouts and (sliced-own or packed64-dpg) and bf16 and new or special and 1.7 and scattered and bf16 or reductions and 5.0 and none and fp32 and gdc or halves and fused and fp32 or fault or linear and dpg and mean-3"
said "the entropy bonus"
suite "$(pwd)" test_token_weight.py \
  -k "layouts and (sliced-gdc and bf16 or packed64-own and fp32) and new or special and scattered and bf16 or grad_output and sum-gdc and bf16 or linear and packed-3-own or may_not_be and nan and kernels or cispo and kernels"
said "weights of tokens"
suite "$(pwd)" test_linear.py test_sample.py -k "test_dtypes and gdc and (float32-bf16-3 or same-fp16-1000) or thousandth and 48 and GPU and bf16 or bad_place and (7 or 1000) or tails and 1.0 and bf16 or bad_row and 512 or strides and not wrong and not fp16"
said "hidden states, sampling"

caught triton_tail "^FAILED " suite -x test_kernels.py -k "vocabularies and 127 and contiguous and fp32"
caught triton_rounding "^FAILED " suite -x test_kernels.py -k "label_gradient and 30-600-fp32"
caught triton_bonus "^FAILED " suite -x test_entropy.py -k "special and 1.7 and scattered and bf16"
caught triton_shifted_weight "^FAILED " suite -x test_token_weight.py -k "linear and packed-3 and dpg and not compile"
said "seeded bugs"
