// What goes into the fused losses and what comes out, on the CPU and on CUDA: plain pointers, sizes and strides.
#pragma once
#include <cstdint>

#include "objective.h"

namespace dmf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct RowOptions {
  int64_t vocab;
  double scale;    // 1 / temperature
  double softcap;  // 0: none
};

// A batch of logits, (B,T,V) with any batch and time strides or packed (N,V) with cu_seqlens. labels holds
// n_rows tokens in sequence order; a negative label is a row that is not scored and not read.
struct Batch {
  DType dtype;
  char* logits;
  int64_t sequences, steps, rows;       // rows = sequences * steps, or N
  int64_t stride_sequence, stride_row;  // in logits; packed: stride_row only
  const int64_t* cu_seqlens;            // sequences + 1, or null
  const int64_t* labels;                // (rows), each < vocab
  RowOptions options;
  int threads;

  DMF_HD int64_t first_row(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * steps; }
  DMF_HD int64_t sequence_of(int64_t row) const {
    if (!cu_seqlens) return row / steps;
    int64_t low = 0, high = sequences;  // the last sequence that starts at row or before: passes empty ones
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (cu_seqlens[middle] <= row ? low : high) = middle;
    }
    return low;
  }
  DMF_HD int64_t offset(int64_t row) const {
    return cu_seqlens ? row * stride_row : row / steps * stride_sequence + row % steps * stride_row;
  }
};

// Per-sequence inputs (sequences), fp64. Null where the objective does not need them.
struct Terms {
  Objective objective;
  const double *log_proposal, *log_target, *log_z, *reward, *log_base, *baseline;
  double constant_baseline;  // where baseline is null
};

// Where a gradient goes: logits itself, or a tensor of the same shape with strides of its own.
struct Gradient {
  char* data;
  int64_t stride_sequence, stride_row;
  DMF_HD int64_t offset(const Batch& b, int64_t row) const {
    return b.cu_seqlens ? row * stride_row : row / b.steps * stride_sequence + row % b.steps * stride_row;
  }
};

DMF_HD double at(const double* values, int64_t i) { return values ? values[i] : 0.0; }

DMF_HD Sequence sequence(const Terms& t, int64_t i, double log_prob) {
  Sequence x{};
  x.log_prob = log_prob;
  x.log_proposal = t.log_proposal ? t.log_proposal[i] : log_prob;
  x.log_target = at(t.log_target, i);
  x.log_z = at(t.log_z, i);
  x.reward = at(t.reward, i);
  x.log_base = at(t.log_base, i);
  x.baseline = t.baseline ? t.baseline[i] : t.constant_baseline;
  return x;
}

struct Outputs {
  double* log_prob;          // (sequences)
  double* lse;               // (rows)
  double* entropy;           // (sequences), or null
  double* log_ratio;         // (sequences), as are the next two; null when only scoring
  double* log_target_ratio;  //
  double* weight;            //
  double* loss;              // (sequences): -A log pi, not divided by anything
  double* total;             // 1: the sum of loss in sequence order, divided by divide_by
  int64_t* clipped;          // number of weights clipped
  double divide_by;
};

enum class Fault : int64_t {
  none = 0,
  bad_row = 1,  // NaN or +inf in a scored row; at: the row
  label = 2,    // the label's logit is -inf; at: the row
  weight = 3,   // the weight does not fit fp32; at: the sequence
  unusual = 4,  // CPU: not is_plain, nothing was done. CUDA: a label that is no token; at: the row
  input = 5,    // CUDA: a per-sequence input that may not be; at: the sequence
};
struct Status {
  Fault fault;
  int64_t at;  // the first place
};

}  // namespace dmf
