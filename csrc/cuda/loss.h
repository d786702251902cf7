// The fused sequence losses on a CUDA device. All pointers of batch, terms and outputs are the device's. Nothing here
// allocates, waits or reads what a device holds; a launch that fails throws.
#pragma once
#include <cstdint>
#include <string>

#include "../sample.h"

namespace dmf::cuda {

// Where a call runs, and its memory, which no other call may use before this one is done.
struct Workspace {
  int device;
  void* stream;
  int64_t* faults;     // (sequences), anything
  unsigned* counters;  // (sequences + 1), 0
  int64_t* status;     // 1: the first fault as place * 8 + fault, -1: none. A weight's place is a sequence, plus 2^59
};

constexpr int64_t kWeightPlace = int64_t{1} << 59;

// One read of the logits of scored rows: log-sum-exp, log pi, weights, loss. cu_seqlens must be in order; labels and
// per-sequence inputs may be anything. A sequence with a fault has weight 0; one with a fault of a row also log pi and
// log-sum-exps NaN and loss 0.
void forward(const Batch&, const Terms&, const Outputs&, const Workspace&);

// forward, and the gradient of upstream * factor * sum of losses, for weights that do not depend on pi. A sequence with
// a fault of a row has gradient 0.
void forward_backward(const Batch&, const Terms&, const Outputs&, double factor, const Gradient&, const Workspace&);

// dz = factor * upstream[0] * (weight[sequence] * share(row) * d(-log-softmax) - bonus.weight[sequence] * dH); upstream
// may be null. Rows that are not scored, have no log-sum-exp or have weight 0 are zeroed without being read.
// Where upstream[0] is unless, dz holds its gradient already and nothing is done.
void backward(const Batch&, const double* lse, const double* weight, const Bonus&, double factor,
              const double* upstream, double unless, const Gradient&, const Workspace&);

// dz *= upstream[0] * factor on scored rows, or on all where labels is null; no gradient is read where that is 1 or 0
void scale(const Batch&, double factor, const double* upstream, const Gradient&, const Workspace&);

// As dmf::sample of csrc/cpu. A row that is no distribution gets token 0 and log_prob NaN; status: the first one.
void sample(const SampleRows&, int64_t* tokens, double* log_prob, const Workspace&);

// Why the kernels can't run on a device, or nothing. Makes a context on it, but for device -1, of which it says what is
// known without one: whether there is a driver, and any device.
std::string why_not(int device);

}  // namespace dmf::cuda
