// One-pass sampling on the CPU: a token per row of logits, with its log-probability.
#pragma once
#include <cstdint>

#include "loss.h"

namespace dmf {

struct SampleRows {
  DType dtype;
  const char* logits;
  int64_t rows, stride_row;
  RowOptions options;
  uint64_t seed;
  const int64_t* row_ids;  // (rows), or null: 0, 1, ...
  uint64_t step;
  const double* uniforms;  // (rows), for tests; null: from the generator
  int threads;
};

// Draws tokens (rows) from softmax(scale * cap(logits)) with log_prob (rows). The draw of a row is a function of its
// logits, seed, row id and step. Fault::bad_row: NaN or +inf in a row, or nothing but -inf.
Status sample(const SampleRows&, int64_t* tokens, double* log_prob);

}  // namespace dmf
