// Row kernels for the CPU.
//
// forward fuses scaling, softcap, log-sum-exp, the gather of the label and the entropy. It reads every
// logit once from memory and writes nothing per logit: less is impossible, since each logit counts in the
// sum. Eager log_softmax + gather reads and writes the row several times and leaves N x V floats behind.
//
// backward reads every logit once and writes its gradient once, in place if asked: softmax is formed
// anew from the stored log-sum-exp, because exp costs less than reading a stored softmax.
//
// The sum runs in blocks (scan.h). Terms are fp32, their sums fp64: in an fp32 sum the thousands of small terms beside
// a dominating one are lost (1e-6 nats a row, all in one direction), and with them the digits of 1 - p, the gradient of
// the label where p is near 1. It costs about a tenth of the time.
//
// This file is compiled once per instruction set (target_clones), chosen when the program runs. It holds
// kernels only: a global constructor compiled for AVX-512 would kill an AVX2 machine at load.
#include "rows.h"

#include <cfloat>
#include <cmath>

#include "scan.h"

namespace dmf {
namespace {

// sum of e^(d nat), and of e^(d nat) d for the entropy, d = cap(z) - reference in units of which nat is in nats
template <bool Entropy>
struct RowTotal {
  const Slope slope;
  const double nat;
  double reference = -INFINITY, sum = 0, moment = 0;

  explicit RowTotal(const RowOptions& o) : slope(o.scale * kLog2e), nat(o.scale) {}

  DMF_INLINE void rise(double grown) {
    if (sum > 0) {
      const double delta = reference - grown, factor = exp(delta * nat);
      moment = factor * (moment + delta * sum);
      sum *= factor;
    }
    reference = grown;
  }

  DMF_INLINE void add(const Block& block, int64_t) {
    double s = 0, m = 0;
#pragma omp simd reduction(+ : s, m)
    for (int64_t i = 0; i < block.n; ++i) {
      const float d = block.x[i] - block.shift;
      const float e = exp2_of(d, slope);
      s += e;
      if (Entropy) m += e == 0.0f ? 0.0f : e * d;
    }
    sum += s;
    if (Entropy) moment += m;
  }
};

template <class T, bool Cap, bool Entropy>
DMF_INLINE void forward_row(const T* z, int64_t label, const RowOptions& o, RowSum& out) {
  RowTotal<Entropy> total(o);
  if (!scan_row<T, Cap>(z, o, total)) total.sum = NAN;
  out.lse = total.nat * total.reference + log(total.sum);  // a row of nothing but -inf: -inf
  out.label = scaled<Cap>(to_float(z[label]), o);
  if (Entropy) out.entropy = log(total.sum) - total.nat * total.moment / total.sum;
}

template <class T, bool Cap>
DMF_INLINE void backward_row(const T* z, T* dz, int64_t label, double weight, double lse, const RowOptions& o) {
  const Slope slope(o.scale * kLog2e);
  const double inverse_cap = Cap ? 1.0 / o.softcap : 0.0;
  const double full = weight * o.scale;
  // read before the row is overwritten; 1 - p in one expm1, without cancellation where p is near 1
  const double y = to_float(z[label]);
  const double t = Cap ? tanh_of(y * inverse_cap) : 0.0;
  const double at_label = full * (1.0 - t * t) * expm1(o.scale * (Cap ? o.softcap * t : y) - lse);
  if (Cap) {
    const double reference = lse / o.scale;
#pragma omp simd
    for (int64_t i = 0; i < o.vocab; ++i) {
      const double th = tanh_of(static_cast<double>(to_float(z[i])) * inverse_cap);
      const float d = static_cast<float>(o.softcap * th - reference);
      from_float(static_cast<float>(full * (1.0 - th * th) * exp2_of(d, slope)), dz[i]);
    }
  } else {
    const float reference = static_cast<float>(lse / o.scale);
    const double factor = full * exp(o.scale * reference - lse);  // mends the rounding of reference
    const float factor32 = static_cast<float>(factor);
    if (std::fabs(factor) <= FLT_MAX) {
#pragma omp simd
      for (int64_t i = 0; i < o.vocab; ++i) from_float(factor32 * exp2_of(to_float(z[i]) - reference, slope), dz[i]);
    } else {  // a weight at the edge of fp32: most of the gradient may still fit
      for (int64_t i = 0; i < o.vocab; ++i)
        from_float(static_cast<float>(factor * exp2_of(to_float(z[i]) - reference, slope)), dz[i]);
    }
  }
  from_float(static_cast<float>(at_label), dz[label]);
}

template <class T>
DMF_INLINE void forward_any(const void* z, int64_t label, const RowOptions& o, bool entropy, RowSum& out) {
  const T* row = static_cast<const T*>(z);
  if (o.softcap > 0)
    entropy ? forward_row<T, true, true>(row, label, o, out) : forward_row<T, true, false>(row, label, o, out);
  else
    entropy ? forward_row<T, false, true>(row, label, o, out) : forward_row<T, false, false>(row, label, o, out);
}

template <class T>
DMF_INLINE void backward_any(const void* z, void* dz, int64_t label, double weight, double lse, const RowOptions& o) {
  if (o.softcap > 0)
    backward_row<T, true>(static_cast<const T*>(z), static_cast<T*>(dz), label, weight, lse, o);
  else
    backward_row<T, false>(static_cast<const T*>(z), static_cast<T*>(dz), label, weight, lse, o);
}

template <class T>
DMF_INLINE void scale_any(void* dz, int64_t vocab, float factor) {
  T* row = static_cast<T*>(dz);
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) from_float(to_float(row[i]) * factor, row[i]);
}

}  // namespace

// target_clones takes no templates, hence the nine functions.
#define DMF_ROWS(T, NAME)                                                                                            \
  DMF_CLONES void forward_##NAME(const void* z, int64_t label, const RowOptions& o, bool entropy, RowSum& out) {     \
    forward_any<T>(z, label, o, entropy, out);                                                                       \
  }                                                                                                                  \
  DMF_CLONES void backward_##NAME(const void* z, void* dz, int64_t label, double w, double l, const RowOptions& o) { \
    backward_any<T>(z, dz, label, w, l, o);                                                                          \
  }                                                                                                                  \
  DMF_CLONES void scale_##NAME(void* dz, int64_t vocab, float factor) { scale_any<T>(dz, vocab, factor); }

DMF_ROWS(float, f32)
DMF_ROWS(bf16, bf16)
DMF_ROWS(fp16, f16)

const RowKernels& row_kernels(DType dtype) {
  static const RowKernels kernels[] = {
      {forward_f32, backward_f32, scale_f32, 4},
      {forward_bf16, backward_bf16, scale_bf16, 2},
      {forward_f16, backward_f16, scale_f16, 2},
  };
  return kernels[static_cast<int>(dtype)];
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
