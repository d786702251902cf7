// Row kernels for the CPU.
//
// forward fuses scaling, softcap, log-sum-exp, the gather of the label and the entropy. It reads every logit once from
// memory and writes nothing per logit. Less is impossible, because each logit counts in the sum. Eager log_softmax and
// gather read and write the row several times and leave N x V floats behind.
//
// backward reads every logit once and writes its gradient once, in place if asked. The softmax is formed anew from the
// stored log-sum-exp, because exp takes less time than reading a stored softmax.
//
// both combines the two for a weight that is known before, with one read and one write per logit. The terms of the sum
// stay in the second-level cache until the sum is known, and are then only scaled. So each logit needs one exp.
//
// Terms are fp32 and their sums fp64. An fp32 sum would lose the thousands of small terms beside a dominating one (1e-6
// nats a row, all in one direction). It would also lose the digits of 1 - p, the gradient of the label where p is near
// 1. Blocks whose terms are small beside the sum so far are first added by fours in fp32 (scan.h), where nothing is
// lost.
//
// rows_fp32.cpp and rows_16bit.cpp compile these kernels, each for its dtypes and once per instruction set
// (target_clones). One version is chosen when the program runs. These files hold kernels only, because a global
// constructor compiled for AVX-512 would crash an AVX2 machine at load.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "rows.h"
#include "scan.h"

namespace dmf {
namespace {

// A sink of scan_row that keeps nothing, or with Entropy the sum of e^(scale d) d, where d = cap(z) - reference.
template <class T, bool Cap, bool Entropy>
struct Summed {
  const T* z;
  const RowOptions& o;
  double moment = 0;
  float* buffer;

  Summed(const T* row, const RowOptions& options, float* memory) : z(row), o(options), buffer(memory) {}
  DMF_INLINE float* terms(int64_t) { return buffer; }
  DMF_INLINE void nothing(int64_t, int64_t) {}
  DMF_INLINE void rise(double by, double sum) {
    if (Entropy && sum > 0) moment = exp(-by * o.scale) * (moment - by * sum);
  }
  DMF_INLINE void add(int64_t first, int64_t n, const float* e, double, double reference) {
    if (!Entropy) return;
    float d[kBlock];
    if (Cap)
      capped_of(z + first, n, reference, o, d);
    else
      for (int64_t i = 0; i < n; ++i) d[i] = to_float(z[first + i]) - static_cast<float>(reference);
    double m = 0;
#pragma omp simd reduction(+ : m)
    for (int64_t i = 0; i < n; ++i) m += e[i] == 0.0f ? 0.0f : e[i] * d[i];  // 0 * -inf = 0
    moment += m;
  }
};

// A sink of scan_row that keeps the terms of the whole row in scratch, or in the gradient where that is fp32. The
// gradient may be the row itself, so a block's terms are copied there only once the block was read.
template <class Out>
struct Kept {
  static constexpr bool kInGradient = sizeof(Out) == sizeof(float);
  float *kept, *buffer;
  double* references;  // one per block

  DMF_INLINE float* terms(int64_t first) { return kInGradient ? buffer : kept + first; }
  DMF_INLINE void nothing(int64_t first, int64_t n) {
    std::fill_n(kept + first, n, 0.0f);
    references[first / kBlock] = -INFINITY;
  }
  DMF_INLINE void rise(double, double) {}
  DMF_INLINE void add(int64_t first, int64_t n, const float* e, double, double reference) {
    if (kInGradient) std::memcpy(kept + first, e, static_cast<size_t>(n) * sizeof(float));
    references[first / kBlock] = reference;
  }
};

template <class T, bool Cap, bool Entropy>
DMF_INLINE void forward_row(const T* z, int64_t label, const RowOptions& o, RowSum& out) {
  float buffer[kBlock];
  Summed<T, Cap, Entropy> sink(z, o, buffer);
  const RowTotal total = scan_row<T, Cap>(z, o, sink);
  out.lse = total.lse(o);
  out.label = label < 0 ? 0.0 : scaled<Cap>(to_float(z[label]), o);
  // a shard's row may be nothing but -inf
  if (Entropy) out.entropy = total.sum > 0 ? log(total.sum) - o.scale * sink.moment / total.sum : total.sum;
}

// Returns dz[label]. One expm1 gives 1 - p without cancellation where p is near 1.
template <bool Cap>
DMF_INLINE double at_label(double y, const RowWeight& w, double lse, const RowOptions& o) {
  const double t = Cap ? tanh_of(y * (1.0 / o.softcap)) : 0.0;
  const double log_p = o.scale * (Cap ? o.softcap * t : y) - lse;
  double g = w.weight * expm1(log_p);
  if (w.bonus != 0.0) g += w.bonus * exp(log_p) * (log_p + w.entropy);
  return o.scale * (1.0 - t * t) * g;
}

// Does both without softcap and bonus, for weights within fp32.
template <class In, class Out>
DMF_INLINE void both_row(const In* z, Out* dz, int64_t label, const RowWeight& w, const RowOptions& o, double* scratch,
                         RowSum& out) {
  float buffer[kBlock];
  float* kept = reinterpret_cast<float*>(Kept<Out>::kInGradient ? static_cast<void*>(dz) : scratch + n_blocks(o));
  Kept<Out> sink{kept, buffer, scratch};
  const double y = to_float(z[label]), full = w.weight * o.scale;
  const RowTotal total = scan_row<In, false>(z, o, sink);
  out.lse = total.lse(o);
  out.label = o.scale * y;
  if (!std::isfinite(out.label - out.lse)) return;
  for (int64_t first = 0; first < o.vocab; first += kBlock) {
    const float factor = static_cast<float>(full * exp(o.scale * scratch[first / kBlock] - out.lse));
    const int64_t n = block_size(first, o);
#pragma omp simd
    for (int64_t i = first; i < first + n; ++i) from_finite(factor * kept[i], dz[i]);
  }
  from_float(static_cast<float>(at_label<false>(y, w, out.lse, o)), dz[label]);
}

// Writes the gradient with an entropy bonus without the label's -weight: p (weight + bonus (log p + H)).
template <class In, class Out, bool Cap>
DMF_INLINE void bonus_row(const In* z, Out* dz, const RowWeight& w, double lse, const RowOptions& o) {
  const Slope slope(o.scale * kLog2e);
  const float floor = slope.floor;  // below it p is 0, and so is p log p
  const double full = w.weight * o.scale, bonus = w.bonus * o.scale;
  if (Cap) {
    const double inverse_cap = 1.0 / o.softcap, reference = lse / o.scale;
    const double constant = full + bonus * w.entropy, linear = bonus * o.scale;
#pragma omp simd
    for (int64_t i = 0; i < o.vocab; ++i) {
      const double th = tanh_of(static_cast<double>(to_float(z[i])) * inverse_cap);
      const float d = static_cast<float>(o.softcap * th - reference);
      const double of_p = constant + linear * static_cast<double>(d);
      from_float(static_cast<float>((1.0 - th * th) * exp2_of(d, slope) * of_p), dz[i]);
    }
    return;
  }
  const float reference = static_cast<float>(lse / o.scale);
  const double off = o.scale * reference - lse, mend = exp(off);  // they correct the rounding of reference
  const double constant = mend * (full + bonus * (off + w.entropy)), linear = mend * bonus * o.scale;
  if (std::fabs(constant) + std::fabs(linear * floor) <= FLT_MAX) {
    const float constant32 = static_cast<float>(constant), linear32 = static_cast<float>(linear);
#pragma omp simd
    for (int64_t i = 0; i < o.vocab; ++i) {
      const float d = to_float(z[i]) - reference;
      from_finite(exp2_of(d, slope) * (constant32 + linear32 * (d < floor ? floor : d)), dz[i]);
    }
  } else {  // weights at the edge of fp32
    for (int64_t i = 0; i < o.vocab; ++i) {
      const float d = to_float(z[i]) - reference;
      const double of_p = constant + linear * static_cast<double>(d < floor ? floor : d);
      from_float(static_cast<float>(of_p * exp2_of(d, slope)), dz[i]);
    }
  }
}

// Writes factor * 2^((z - reference) slope), which is the gradient of all tokens but the label. Logits are prefetched,
// because the hardware's prefetching does not overlap so much arithmetic with memory.
template <class In, class Out>
DMF_INLINE void scaled_terms(const In* z, Out* dz, int64_t n, float factor, float reference, Slope slope) {
  constexpr int64_t kStep = 64, kAhead = 2048 / sizeof(In);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t k = 0; k < kStep; k += 64 / static_cast<int64_t>(sizeof(In))) __builtin_prefetch(z + i + k + kAhead);
#pragma omp simd
    for (int64_t k = i; k < i + kStep; ++k) from_finite(factor * exp2_of(to_float(z[k]) - reference, slope), dz[k]);
  }
#pragma omp simd
  for (int64_t k = i; k < n; ++k) from_finite(factor * exp2_of(to_float(z[k]) - reference, slope), dz[k]);
}

template <class In, class Out, bool Cap>
DMF_INLINE void backward_row(const In* z, Out* dz, int64_t label, const RowWeight& w, double lse, const RowOptions& o) {
  const Slope slope(o.scale * kLog2e);
  const double inverse_cap = Cap ? 1.0 / o.softcap : 0.0;
  const double full = w.weight * o.scale;
  // the label's logit is read before the row is overwritten
  const double label_gradient = label < 0 ? 0.0 : at_label<Cap>(to_float(z[label]), w, lse, o);
  if (w.bonus != 0.0) {
    bonus_row<In, Out, Cap>(z, dz, w, lse, o);
  } else if (Cap) {
    const double reference = lse / o.scale;
#pragma omp simd
    for (int64_t i = 0; i < o.vocab; ++i) {
      const double th = tanh_of(static_cast<double>(to_float(z[i])) * inverse_cap);
      const float d = static_cast<float>(o.softcap * th - reference);
      from_float(static_cast<float>(full * (1.0 - th * th) * exp2_of(d, slope)), dz[i]);
    }
  } else {
    const float reference = static_cast<float>(lse / o.scale);
    const double factor = full * exp(o.scale * reference - lse);  // corrects reference's rounding
    const float factor32 = static_cast<float>(factor);
    if (std::fabs(factor) <= FLT_MAX) {
      scaled_terms(z, dz, o.vocab, factor32, reference, slope);
    } else {  // a weight at the edge of fp32: most of the gradient may still fit
      for (int64_t i = 0; i < o.vocab; ++i)
        from_float(static_cast<float>(factor * exp2_of(to_float(z[i]) - reference, slope)), dz[i]);
    }
  }
  if (label >= 0) from_float(static_cast<float>(label_gradient), dz[label]);
}

template <class T>
DMF_INLINE void forward_any(const void* z, int64_t label, const RowOptions& o, bool entropy, RowSum& out) {
  const T* row = static_cast<const T*>(z);
  if (o.softcap > 0)
    entropy ? forward_row<T, true, true>(row, label, o, out) : forward_row<T, true, false>(row, label, o, out);
  else
    entropy ? forward_row<T, false, true>(row, label, o, out) : forward_row<T, false, false>(row, label, o, out);
}

template <class In, class Out>
DMF_INLINE void backward_any(const void* z, void* dz, int64_t label, const RowWeight& w, double lse,
                             const RowOptions& o) {
  if (o.softcap > 0)
    backward_row<In, Out, true>(static_cast<const In*>(z), static_cast<Out*>(dz), label, w, lse, o);
  else
    backward_row<In, Out, false>(static_cast<const In*>(z), static_cast<Out*>(dz), label, w, lse, o);
}

template <class In, class Out>
DMF_INLINE void both_any(const void* z, void* dz, int64_t label, const RowWeight& w, const RowOptions& o, bool entropy,
                         double* scratch, RowSum& out) {
  if (o.softcap == 0 && !entropy && std::fabs(w.weight * o.scale) <= FLT_MAX) {
    both_row<In, Out>(static_cast<const In*>(z), static_cast<Out*>(dz), label, w, o, scratch, out);
    return;
  }
  forward_any<In>(z, label, o, entropy, out);
  if (std::isfinite(out.label - out.lse))
    backward_any<In, Out>(z, dz, label, RowWeight{w.weight, w.bonus, out.entropy}, out.lse, o);
}

template <class T>
DMF_INLINE void scale_any(void* dz, int64_t vocab, float factor) {
  T* row = static_cast<T*>(dz);
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) from_float(to_float(row[i]) * factor, row[i]);
}

}  // namespace
}  // namespace dmf

// target_clones takes no templates, hence a function for each dtype.
#define DMF_ROWS(T, NAME)                                                                                        \
  DMF_CLONES void forward_##NAME(const void* z, int64_t label, const RowOptions& o, bool entropy, RowSum& out) { \
    forward_any<T>(z, label, o, entropy, out);                                                                   \
  }                                                                                                              \
  DMF_CLONES void scale_##NAME(void* dz, int64_t vocab, float factor) { scale_any<T>(dz, vocab, factor); }
#define DMF_GRADIENTS(In, Out, NAME)                                                                           \
  DMF_CLONES void backward_##NAME(const void* z, void* dz, int64_t label, const RowWeight& w, double l,        \
                                  const RowOptions& o) {                                                       \
    backward_any<In, Out>(z, dz, label, w, l, o);                                                              \
  }                                                                                                            \
  DMF_CLONES void both_##NAME(const void* z, void* dz, int64_t label, const RowWeight& w, const RowOptions& o, \
                              bool entropy, double* scratch, RowSum& out) {                                    \
    both_any<In, Out>(z, dz, label, w, o, entropy, scratch, out);                                              \
  }
