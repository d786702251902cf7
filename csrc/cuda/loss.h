// The fused sequence losses on a CUDA device. All pointers of batch, terms and outputs point to device memory. No
// function here allocates, waits, or reads device memory on the host. A launch that fails throws.
#pragma once
#include <cstdint>
#include <string>

#include "../sample.h"

namespace dmf::cuda {

// The device and stream of a call, and its memory, which no other call may use before this one is done.
struct Workspace {
  int device;
  void* stream;
  int64_t* faults;     // (sequences), uninitialised; for at most kFewRows rows, (rows, kMostParts, 2) more for parts
  unsigned* counters;  // (sequences + 1), all 0; for at most kFewRows rows, (rows) more
  int64_t* status;     // (1), the first fault as place * 8 + fault, or -1. A weight's place is its sequence + 2^59
};

constexpr int64_t kWeightPlace = int64_t{1} << 59;

// Computes log-sum-exps, log pi, weights and the loss in one read of the logits of scored rows. cu_seqlens must be in
// order; labels and per-sequence inputs may hold any values. A sequence with a fault has weight 0. If the fault is in a
// row, log pi and the log-sum-exps of the sequence are NaN and its loss is 0.
void forward(const Batch&, const Terms&, const Outputs&, const Workspace&);

// Does forward and writes the gradient of factor * sum of losses, for weights that do not depend on pi. A sequence with
// a fault in a row has gradient 0.
void forward_backward(const Batch&, const Terms&, const Outputs&, double factor, const Gradient&, const Workspace&);

// Writes dz = factor * upstream[0] * (weight[sequence] * share(row) * d(-log-softmax) - bonus.weight[sequence] * dH).
// upstream may be null, which counts as 1. Rows that are not scored, have no log-sum-exp or have weight 0 are zeroed
// without being read. If upstream[0] equals unless, dz holds its gradient already and nothing is done.
void backward(const Batch&, const double* lse, const double* weight, const Bonus&, double factor,
              const double* upstream, double unless, const Gradient&, const Workspace&);

// Multiplies dz by upstream[0] * factor on scored rows, or on all rows if labels is null. The gradient is not read if
// the product is 1 or 0.
void scale(const Batch&, double factor, const double* upstream, const Gradient&, const Workspace&);

// Does what dmf::sample of csrc/cpu does. A row that is not a distribution gets token 0 and log_prob NaN, and status is
// the first such row.
void sample(const SampleRows&, int64_t* tokens, double* log_prob, const Workspace&);

// Returns why the kernels can't run on a device, or an empty string. It creates a context on the device. For device -1
// it creates none, and says only whether there are a driver and a device.
std::string why_not(int device);

}  // namespace dmf::cuda
