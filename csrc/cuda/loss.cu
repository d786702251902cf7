// score_rows fuses scaling, softcap, log-sum-exp, the gather of the label and the entropy, sums them over sequences and
// forms ratios, weights and the loss, in one launch. It reads every logit of a scored row once and writes nothing per
// logit: less is impossible, since each logit counts in the sum.
//
// For weights that do not depend on pi it writes the gradient too: 1 read and 1 write per logit where the row fits
// shared memory, in which it waits for its log-sum-exp, else 2 reads, of which the second is meant for the second-level
// cache (plan.h).
//
// A gradient in place is safe where it is as wide as its logits, since a thread then writes only where it has read. A
// 16-bit gradient of fp32 logits must have memory of its own: gradients 2i and 2i + 1 would overwrite logit i, which
// another thread may have yet to read.
//
// A block has one row. Blocks count themselves on a counter of their sequence, whose last block adds up its rows in a
// fixed order; the last of all sequences adds up the loss. So there is no atomic on a float, and the result does not
// depend on who is last. Each sequence has a block of its own besides its rows, so that one without rows ends too.
#include <climits>
#include <string>

#include "loss.h"
#include "plan.h"
#include "rows.cuh"

namespace dmf::cuda {
namespace {

enum class Pass { score, kept, reread };  // kept, reread: with the gradient; how the row comes a second time

constexpr long long kNone = LLONG_MAX;
constexpr int kLosses = 128;  // that wait in shared memory to be added up

struct Shared {
  Lanes<float> top;
  Lanes<Sums> sums, sequence;
  Lanes<long long> fault, first;
  double losses[kLosses];
  double lse, coefficient, at_label;
  bool last;
};
static_assert(sizeof(Shared) <= kStaticShared, "plan.h leaves it that much");

__device__ long long encode(int64_t place, Fault fault) { return place * 8 + static_cast<int64_t>(fault); }

// What no objective may be given: NaN anywhere, an infinity that is none of those with a meaning.
__device__ bool inputs_ok(const Terms& t, const Sequence& x) {
  const bool base = isfinite(x.log_base) || (x.log_base == -INFINITY && t.objective.max_weight < INFINITY);
  return (!t.has(kLogProposal) || isfinite(x.log_proposal)) && x.log_target < INFINITY && x.log_z < INFINITY &&
         isfinite(x.reward) && isfinite(x.baseline) && base;
}

// A known weight; 0 where it can't be used.
__device__ Weight known_weight(const Terms& t, int64_t i) {
  const Sequence x = sequence(t, i, t.at(kLogProposal, i));
  Weight w = weigh(t.objective, x);
  if (w.out_of_range || !inputs_ok(t, x)) w.weight = 0.0;
  return w;
}

__device__ void finish_sequence(const Batch& b, const Terms& t, const Outputs& out, long long* faults, int64_t i,
                                bool known, Shared& shared) {
  const int64_t first = b.first_row(i), last = b.first_row(i + 1);
  Sums sums{0, 0, 0};
  long long fault = kNone;
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) {
    const int64_t label = b.labels[row];
    if (label == kIgnore) continue;
    const double lse = out.lse(row), log_prob = out.label(row) - lse;
    sums.a += log_prob;
    if (out.entropy) sums.b += out.row_entropy(row);
    Fault found = Fault::none;
    if (!b.is_token(label))
      found = Fault::unusual;
    else if (isnan(lse) || lse == INFINITY)
      found = Fault::bad_row;
    else if (b.column(label) != kElsewhere && !(log_prob > -INFINITY))
      found = Fault::label;
    if (found != Fault::none) fault = min(fault, encode(row, found));
  }
  sums = block_sum(sums, shared.sequence);
  fault = block_min(fault, shared.fault);
  const bool bad_rows = fault != kNone;
  if (bad_rows)  // so that backward, whatever weight it is given, writes 0
    for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) out.lse(row) = NAN;
  if (threadIdx.x != 0) return;
  const double log_prob = bad_rows ? static_cast<double>(NAN) : sums.a;
  out.log_prob(i) = log_prob;
  out.sequence_entropy(i) = bad_rows ? static_cast<double>(NAN) : sums.b;  // 0 where it is not wanted
  if (t.objective.kind != Kind::none) {
    const Sequence x = sequence(t, i, log_prob);
    Weight w = weigh(t.objective, x);
    out.log_ratio(i) = w.log_ratio;
    out.log_target_ratio(i) = w.log_target_ratio;
    if (known) w = weigh(t.objective, sequence(t, i, t.at(kLogProposal, i)));
    out.clipped(i) = w.clipped;
    if (!bad_rows) {
      // a row's fault comes before a weight's, as on the CPU
      if (!inputs_ok(t, x))
        fault = encode(kWeightPlace + i, Fault::input);
      else if (w.out_of_range)
        fault = encode(kWeightPlace + i, Fault::weight);
    }
    const double weight = fault == kNone ? w.weight : 0.0;
    out.weight(i) = weight;
    out.loss(i) = weight == 0.0 ? 0.0 : -weight * log_prob;  // 0 * -inf = 0
  }
  faults[i] = fault;
}

__device__ void finish_loss(const Batch& b, const Terms& t, const Outputs& out, const long long* faults,
                            int64_t* status, Shared& shared) {
  long long fault = kNone;
  for (int64_t i = threadIdx.x; i < b.sequences; i += blockDim.x) fault = min(fault, faults[i]);
  fault = block_min(fault, shared.first);
  if (threadIdx.x == 0) *status = fault == kNone ? -1 : fault;
  if (t.objective.kind == Kind::none) return;
  double total = 0;  // in sequence order, as on the CPU
  for (int64_t first = 0; first < b.sequences; first += kLosses) {
    const int n = static_cast<int>(min(b.sequences - first, int64_t{kLosses}));
    for (int i = threadIdx.x; i < n; i += blockDim.x) shared.losses[i] = out.loss(first + i);
    __syncthreads();
    if (threadIdx.x == 0)
      for (int i = 0; i < n; ++i) total += shared.losses[i];
    __syncthreads();  // they are read before the next ones come
  }
  if (threadIdx.x == 0) *out.total = total / out.divide_by;
}

// dz = p * scale of the row, apart from the label's column, whose value is at_label. A label that is elsewhere has a
// column outside the row.
template <class In, class Out, bool Cap>
struct Write {
  Exponent<Cap> exponent;
  float factor, after;  // the factor in two parts, so that one at the edges of fp32 keeps its digits
  float at_label;
  int label;
  Out* dz;

  // dz[v] = coefficient * scale * cap'(z[v]) * (softmax[v] - (v == label))
  __device__ Write(const RowOptions& o, double lse, double coefficient, double at_label, int label, Out* dz)
      : exponent(o), at_label(static_cast<float>(at_label)), label(label), dz(dz) {
    double reference = lse / o.scale;  // a logit whose term is near 1
    if (Cap) reference = o.softcap * atanh(fmin(fmax(reference / o.softcap, -0.999), 0.999));
    exponent.set(static_cast<float>(reference));
    // mends the rounding of the reference
    const double full = coefficient * o.scale * exp(scaled(exponent.reference, o) - lse), size = fabs(full);
    after = size > 0x1p100 ? 0x1p64f : (size < 0x1p-60 ? 0x1p-64f : 1.0f);
    factor = static_cast<float>(full / after);
  }

  template <int N>
  __device__ void operator()(int first, const Pack<In, N>& pack) const {
    Pack<Out, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float z = to_float(pack.x[j]);
      float g = factor * expf(exponent(z));
      if constexpr (Cap) g *= exponent.slope(z);
      from_float(g * after, out.x[j]);
    }
    if (static_cast<unsigned>(label - first) < N) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (first + j == label) from_float(at_label, out.x[j]);
    }
    store(dz + first, out);
  }
};

// The label's column in one subtraction, without cancellation where p is near 1. To be called before dz, which may be
// z, is written.
__device__ double label_gradient(float z, double lse, double coefficient, const RowOptions& o) {
  const double t = o.softcap > 0 ? tanh(z / o.softcap) : 0.0;
  return coefficient * o.scale * (1.0 - t * t) * expm1(scaled(z, o) - lse);
}

template <class T>
__device__ T* row_of(const Gradient& g, const Batch& b, int64_t row) {
  return reinterpret_cast<T*>(g.data) + g.offset(b, row);
}

template <class In, class Out, bool Cap, bool Entropy, Pass P>
__device__ void score_row(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                          int64_t row, int64_t sequence, Shared& shared) {
  constexpr bool kKnown = P != Pass::score;
  DMF_DYNAMIC_SHARED(memory);
  const RowOptions& o = b.options;
  const int64_t label = b.labels[row];
  const int column = static_cast<int>(label - b.vocab_start), vocab = static_cast<int>(o.vocab);
  const In* z = reinterpret_cast<const In*>(b.logits) + b.offset(row);
  Out* dz = kKnown ? row_of<Out>(g, b, row) : nullptr;
  if (!b.is_token(label)) {
    if (threadIdx.x == 0) {
      out.lse(row) = label == kIgnore ? 0.0 : static_cast<double>(NAN);
      out.label(row) = 0.0;
      if (Entropy) out.row_entropy(row) = 0.0;
    }
    if (kKnown) zero_row(dz, vocab);
    return;
  }
  const Cut cut = cut_row(z, vocab);
  // the row's packs lie aligned in shared memory too
  In* kept = reinterpret_cast<In*>(memory) + (kWidth<In> - cut.head % kWidth<In>) % kWidth<In>;
  // read before dz, which may be z, is written
  const bool here = static_cast<unsigned>(column) < static_cast<unsigned>(vocab);
  const float at_label = threadIdx.x == 0 && here ? to_float(z[column]) : 0.0f;

  // A needs many registers. It is formed before the sum where the sum needs the most.
  constexpr bool kEarly = kKnown && Cap && Entropy;
  if (kEarly && threadIdx.x == 0) shared.coefficient = known_weight(t, sequence).weight * factor;

  PartialSum<Cap, Entropy> sum(o);
  for_row<In>(cut, FromRow<In>{z}, [&](int i, const auto& pack) {
    if constexpr (P == Pass::kept) store(kept + i, pack);
    sum.add(pack);
  });
  const float top = block_max(sum.exponent.reference, shared.top);
  if (top > sum.exponent.reference) sum.rise(top);
  const Sums sums = block_sum({static_cast<double>(sum.ones), sum.rest, sum.moment}, shared.sums);
  if (threadIdx.x == 0) {
    const double total = sums.a + sums.b, lse = scaled(top, o) + log(total);
    out.lse(row) = lse;
    out.label(row) = scaled(at_label, o);
    if (Entropy) out.row_entropy(row) = total == 0.0 ? 0.0 : log(total) - sums.c / total;  // nothing but -inf
    if (kKnown) {
      double coefficient = 0.0;
      if (isfinite(lse)) coefficient = kEarly ? shared.coefficient : known_weight(t, sequence).weight * factor;
      shared.lse = lse;
      shared.coefficient = coefficient;
      shared.at_label = coefficient == 0.0 ? 0.0 : label_gradient(at_label, lse, coefficient, o);
    }
  }
  if (!kKnown) return;
  __syncthreads();
  if (shared.coefficient == 0.0) {
    zero_row(dz, vocab);
    return;
  }
  const Write<In, Out, Cap> write(o, shared.lse, shared.coefficient, shared.at_label, column, dz);
  for_row<Out>(cut_rows(z, dz, vocab), FromRow<In>{P == Pass::kept ? kept : z}, write);
}

// The score reaches 4 blocks anyway. Without the bound, the compiler spills on sm_80 to reach 5.
template <class In, class Out, bool Cap, bool Entropy, Pass P>
__global__ void __launch_bounds__(P == Pass::score ? kMaxThreads : kMaxKnownThreads, P == Pass::score ? 4 : 0)
    score_rows(Batch b, Terms t, Outputs out, double factor, Gradient g, Workspace w) {
  DMF_SHARED(Shared, shared);
  constexpr bool kKnown = P != Pass::score;
  long long* const faults = reinterpret_cast<long long*>(w.faults);
  const int64_t block = blockIdx.x, row = block - b.sequences - 1;
  if (block != b.sequences) {  // that one is the loss's own, for a batch without sequences
    const int64_t i = block < b.sequences ? block : b.sequence_of(row);
    if (row >= 0) score_row<In, Out, Cap, Entropy, P>(b, t, out, factor, g, row, i, shared);
    if (!is_last(w.counters + i, b.first_row(i + 1) - b.first_row(i) + 1, shared.last)) return;
    finish_sequence(b, t, out, faults, i, kKnown, shared);
    if (kKnown) {
      __syncthreads();
      if (faults[i] != kNone && out.weight(i) == 0.0)
        for (int64_t r = b.first_row(i); r < b.first_row(i + 1); ++r)
          zero_row(row_of<Out>(g, b, r), static_cast<int>(b.options.vocab));
    }
  }
  if (is_last(w.counters + b.sequences, b.sequences + 1, shared.last)) finish_loss(b, t, out, faults, w.status, shared);
}

// fp32 reaches 6 blocks anyway. Without the bound, the compiler spills on sm_80 to reach 8. With a 16-bit gradient a
// thread has twice as many logits under way, for which the registers of 6 blocks are too few on sm_100.
template <class In, class Out, bool Cap>
__global__ void __launch_bounds__(kMaxThreads, sizeof(In) == 4 && !Cap ? (sizeof(Out) == 4 ? 6 : 5) : 0)
    write_rows(Batch b, const double* lse, const double* weight, double factor, const double* upstream, double unless,
               Gradient g) {
  struct OneRow {
    double coefficient, at_label;
  };
  DMF_SHARED(OneRow, shared);
  if (upstream && *upstream == unless) return;
  const RowOptions& o = b.options;
  const int64_t row = blockIdx.x, label = b.labels[row];
  // beyond the row where the label is elsewhere: no pack has it
  const int column = static_cast<int>(label - b.vocab_start), vocab = static_cast<int>(o.vocab);
  const In* z = reinterpret_cast<const In*>(b.logits) + b.offset(row);
  Out* dz = row_of<Out>(g, b, row);
  if (threadIdx.x == 0) {
    const bool scored = b.is_token(label) && isfinite(lse[row]);
    const double coefficient = scored ? weight[b.sequence_of(row)] * factor * (upstream ? *upstream : 1.0) : 0.0;
    shared.coefficient = coefficient;
    const bool here = static_cast<unsigned>(column) < static_cast<unsigned>(vocab);
    shared.at_label = coefficient == 0.0 || !here ? 0.0 : label_gradient(to_float(z[column]), lse[row], coefficient, o);
  }
  __syncthreads();
  if (shared.coefficient == 0.0) {
    zero_row(dz, vocab);
    return;
  }
  const Write<In, Out, Cap> write(o, lse[row], shared.coefficient, shared.at_label, column, dz);
  for_row<Out>(cut_rows(z, dz, vocab), FromRow<In>{z}, write);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) scale_rows(Batch b, double factor, const double* upstream, Gradient g) {
  const float by = static_cast<float>(factor * *upstream);
  const int64_t row = blockIdx.x;
  if (by == 1.0f || (b.labels && b.labels[row] < 0)) return;
  T* dz = row_of<T>(g, b, row);
  if (by == 0.0f) {  // an overflow times 0 is 0
    zero_row(dz, static_cast<int>(b.options.vocab));
    return;
  }
  for_row<T>(cut_row(dz, static_cast<int>(b.options.vocab)), FromRow<T>{dz}, [&](int i, const auto& pack) {
    auto scaled_pack = pack;
    for (auto& x : scaled_pack.x) from_float(to_float(x) * by, x);
    store(dz + i, scaled_pack);
  });
}

// --- launching -----------------------------------------------------------------------------------------------------

// Calls body with a value of a dtype's type.
template <class Body>
void with_type(DType dtype, Body body) {
  if (dtype == DType::f32)
    body(float{});
  else if (dtype == DType::bf16)
    body(bf16{});
  else
    body(f16{});
}

// Calls body with a value of the type of the logits and one of the type of their gradient.
template <class Body>
void with_types(DType logits, DType gradient, Body body) {
  if (logits == gradient)
    with_type(logits, [&](auto type) { body(type, type); });
  else if (logits != DType::f32)
    throw std::runtime_error("the gradient of 16-bit logits has their dtype");
  else if (gradient == DType::bf16)
    body(float{}, bf16{});
  else
    body(float{}, f16{});
}

unsigned grid(const Batch& b, int64_t blocks) {
  if (blocks > INT_MAX || b.options.vocab > INT_MAX - 64) throw std::runtime_error("too many rows, or too long ones");
  return static_cast<unsigned>(blocks);
}

template <class In, class Out, bool Cap, bool Entropy, Pass P>
void launch_score(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                  const Workspace& w, const Plan& plan) {
  const auto kernel = score_rows<In, Out, Cap, Entropy, P>;
  if (plan.shared > 0) allow_shared(kernel, shared_for_row(shared_limit(w.device)));
  DMF_LAUNCH(kernel, grid(b, b.rows + b.sequences + 1), plan.threads, static_cast<size_t>(plan.shared),
             static_cast<cudaStream_t>(w.stream), b, t, out, factor, g, w);
  check(cudaGetLastError());
}

template <class T, bool Cap, bool Entropy>
void launch_scoring(const Batch& b, const Terms& t, const Outputs& out, const Workspace& w) {
  launch_score<T, T, Cap, Entropy, Pass::score>(b, t, out, 0.0, Gradient{}, w, plan_once(b.options.vocab, sizeof(T)));
}

template <class In, class Out, bool Cap, bool Entropy>
void launch_known(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                  const Workspace& w) {
  const Plan plan = plan_known(b.options.vocab, sizeof(In), shared_limit(w.device));
  const auto launch =
      plan.kept ? launch_score<In, Out, Cap, Entropy, Pass::kept> : launch_score<In, Out, Cap, Entropy, Pass::reread>;
  launch(b, t, out, factor, g, w, plan);
}

}  // namespace

void forward(const Batch& b, const Terms& t, const Outputs& out, const Workspace& w) {
  const OnDevice guard(w.device);
  with_type(b.dtype, [&](auto type) {
    using T = decltype(type);
    const bool cap = b.options.softcap > 0;
    const auto launch = cap ? (out.entropy ? launch_scoring<T, true, true> : launch_scoring<T, true, false>)
                            : (out.entropy ? launch_scoring<T, false, true> : launch_scoring<T, false, false>);
    launch(b, t, out, w);
  });
}

void forward_backward(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                      const Workspace& w) {
  const OnDevice guard(w.device);
  with_types(b.dtype, g.dtype, [&](auto in, auto of_gradient) {
    using In = decltype(in);
    using Out = decltype(of_gradient);
    const bool cap = b.options.softcap > 0;
    const auto launch = cap ? (out.entropy ? launch_known<In, Out, true, true> : launch_known<In, Out, true, false>)
                            : (out.entropy ? launch_known<In, Out, false, true> : launch_known<In, Out, false, false>);
    launch(b, t, out, factor, g, w);
  });
}

void backward(const Batch& b, const double* lse, const double* weight, double factor, const double* upstream,
              double unless, const Gradient& g, const Workspace& w) {
  if (b.rows == 0) return;
  const OnDevice guard(w.device);
  with_types(b.dtype, g.dtype, [&](auto in, auto of_gradient) {
    using In = decltype(in);
    using Out = decltype(of_gradient);
    const auto kernel = b.options.softcap > 0 ? write_rows<In, Out, true> : write_rows<In, Out, false>;
    DMF_LAUNCH(kernel, grid(b, b.rows), plan_once(b.options.vocab, sizeof(In)).threads, 0,
               static_cast<cudaStream_t>(w.stream), b, lse, weight, factor, upstream, unless, g);
  });
  check(cudaGetLastError());
}

void scale(const Batch& b, double factor, const double* upstream, const Gradient& g, const Workspace& w) {
  if (b.rows == 0) return;
  const OnDevice guard(w.device);
  with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = scale_rows<T>;
    DMF_LAUNCH(kernel, grid(b, b.rows), plan_once(b.options.vocab, sizeof(T)).threads, 0,
               static_cast<cudaStream_t>(w.stream), b, factor, upstream, g);
  });
  check(cudaGetLastError());
}

namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

}  // namespace

std::string why_not(int device) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess) {
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (found == cudaErrorNoDevice) return "compiled, no device";
    if (found != cudaErrorInsufficientDriver)
      return std::string("compiled, but CUDA says: ") + cudaGetErrorString(found);
    if (driver == 0) return "compiled, no device: there is no NVIDIA driver";
    return "compiled for CUDA " + version(runtime) + ", but the NVIDIA driver is for CUDA " + version(driver) +
           " at most; update the driver, or reinstall with an older nvcc";
  }
  if (device < 0) return "";
  if (device >= count) return "compiled, no device " + std::to_string(device);
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, scale_rows<float>);
  if (loaded == cudaSuccess) return "";
  cudaGetLastError();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string arch = std::to_string(major) + std::to_string(minor);
  return "compiled, but nothing that device " + std::to_string(device) + " (sm_" + arch +
         ") can run: " + cudaGetErrorString(loaded) + "; reinstall with DMFAST_CUDA_ARCHS=" + arch;
}

}  // namespace dmf::cuda
