// The fused sequence losses on the CPU. Threads share the rows, and sequences are summed in a fixed order.
#pragma once
#include "../batch.h"
#include "rows.h"

namespace dmf {

// Returns whether all values are ordinary: labels in [0, V) or -100, cu_seqlens rising from 0 to the number of rows,
// inputs finite (log_target and log_z may be -inf), token weights in their range. If not, Python finds out whether
// something is wrong, and what.
bool is_plain(const Batch&, const Terms&);

// Computes log-sum-exp, log pi, weights and loss with one read of the logits of scored rows. Unless checked, is_plain
// is asked first.
Status forward(const Batch&, const Terms&, const Outputs&, bool checked);

// Writes dz = factor * upstream[0] * (weight[sequence] * share(row) * d(-log-softmax) - bonus.weight[sequence] * dH),
// where upstream may be null, with one read and one write per logit. Rows that are not scored or have weight 0 are
// zeroed without being read.
void backward(const Batch&, const double* lse, const double* weight, const Bonus& bonus, double factor,
              const double* upstream, const Gradient&);

// Does forward and backward in one pass over the rows, for weights that do not depend on pi. A row is still in the
// second-level cache when its gradient is written. Weights are formed and checked before a row is touched.
Status forward_backward(const Batch&, const Terms&, const Outputs&, bool checked, double factor, const Gradient&);

// Multiplies dz by upstream[0] * factor on scored rows, or on all where labels is null. A factor of 1 does nothing. A
// factor of 0 reads nothing, so that an overflow times 0 is 0.
void scale(const Batch&, double factor, const double* upstream, const Gradient&);

}  // namespace dmf
