// The choice of the row kernels, which row_kernels.h describes.
#include "rows.h"

#include <stdexcept>

#include "scan.h"

namespace dmf {

int64_t scratch_size(const RowOptions& o) { return n_blocks(o) + (o.vocab + 1) / 2; }

RowKernels row_kernels(DType logits, DType gradient) {
  if (logits == DType::f32) return rows_of_fp32(gradient);
  if (gradient != logits) throw std::invalid_argument("the gradient of 16-bit logits must have their dtype");
  return rows_of_16_bits(logits);
}

const char* instruction_set() {
#if DMF_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace dmf
