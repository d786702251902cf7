// The row kernels for bf16 and fp16 logits, whose gradient has their dtype.
#include "row_kernels.h"

namespace dmf {

DMF_ROWS(bf16, bf16)
DMF_ROWS(fp16, f16)
DMF_GRADIENTS(bf16, bf16, bf16)
DMF_GRADIENTS(fp16, fp16, f16)

RowKernels rows_of_16_bits(DType dtype) {
  if (dtype == DType::bf16) return {forward_bf16, backward_bf16, both_bf16, scale_bf16, 2, 2};
  return {forward_f16, backward_f16, both_f16, scale_f16, 2, 2};
}

}  // namespace dmf
