// The inputs of one-pass sampling on the CPU and on CUDA, and the way from a uniform number to a token.
#pragma once
#include "batch.h"

namespace dmf {

struct SampleRows {
  DType dtype;
  const char* logits;
  int64_t rows, stride_row;
  RowOptions options;
  uint64_t seed;
  const int64_t* row_ids;  // (rows), or null: 0, 1, ...
  uint64_t step;
  const double* uniforms;  // (rows), which tests give; null: the generator's
};

// Returns the first of n weights with which the running sum exceeds target, else the last that is not 0, because
// rounding may leave the target at the very end. The sum before that weight is subtracted from target.
template <class Weight>
DMF_HD int pick(int n, double& target, Weight weight) {
  double before = 0, rest = target;
  int picked = 0;
  for (int i = 0; i < n; ++i) {
    const double w = weight(i);
    if (!(w > 0)) continue;
    picked = i;
    rest = target - before;
    before += w;
    if (before > target) break;
  }
  target = rest;
  return picked;
}

}  // namespace dmf
