// The fused sequence losses on the CPU: rows on threads, sequences summed in a fixed order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../objective.h"
#include "rows.h"

namespace dmf {

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

  int64_t first_row(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * steps; }
  int64_t sequence_of(int64_t row) const {
    if (!cu_seqlens) return row / steps;
    return std::upper_bound(cu_seqlens, cu_seqlens + sequences + 1, row) - cu_seqlens - 1;  // passes empty sequences
  }
  int64_t offset(int64_t row) const {
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
  int64_t offset(const Batch& b, int64_t row) const {
    return b.cu_seqlens ? row * stride_row : row / b.steps * stride_sequence + row % b.steps * stride_row;
  }
};

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
  unusual = 4,  // not is_plain: nothing was done
};
struct Status {
  Fault fault;
  int64_t at;  // the first place
};

// Whether all values are ordinary: labels in [0, V) or -100, cu_seqlens rising from 0 to the number of rows, inputs
// finite (log_target and log_z may be -inf). If not, Python finds out whether something is wrong, and what.
bool is_plain(const Batch&, const Terms&);

// One read of the logits of scored rows: log-sum-exp, log pi, weights, loss. Unless checked, is_plain is asked first.
Status forward(const Batch&, const Terms&, const Outputs&, bool checked);

// dz = weight[sequence] * factor * d(log-softmax), one read and one write per logit; rows that are not scored
// and sequences of weight 0 are zeroed without being read.
void backward(const Batch&, const double* lse, const double* weight, double factor, const Gradient&);

// forward and backward in one pass over the rows, for weights that do not depend on pi: a row is still in the
// second-level cache when its gradient is written. Weights are formed, and refused, before a row is touched.
Status forward_backward(const Batch&, const Terms&, const Outputs&, bool checked, double factor, const Gradient&);

// dz *= factor
void scale(const Batch&, double factor, const Gradient&);

}  // namespace dmf
