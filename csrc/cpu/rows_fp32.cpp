// The row kernels for fp32 logits, whose gradient is fp32 or has 16 bits.
#include "row_kernels.h"

namespace dmf {

DMF_ROWS(float, f32)
DMF_GRADIENTS(float, float, f32)
DMF_GRADIENTS(float, bf16, f32_bf16)
DMF_GRADIENTS(float, fp16, f32_f16)

RowKernels rows_of_fp32(DType gradient) {
  if (gradient == DType::f32) return {forward_f32, backward_f32, both_f32, scale_f32, 4, 4};
  const ScaleRow scale = rows_of_16_bits(gradient).scale;
  if (gradient == DType::bf16) return {forward_f32, backward_f32_bf16, both_f32_bf16, scale, 4, 2};
  return {forward_f32, backward_f32_f16, both_f32_f16, scale, 4, 2};
}

}  // namespace dmf
