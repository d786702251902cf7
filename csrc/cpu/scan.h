// The row kernels read a row once, in blocks of 512 logits. The terms of a block, e^(scale (cap(z) - reference)), stay
// in the first-level cache for the caller, who makes a sum, a gradient (row_kernels.h) or a draw (sample.cpp) of them.
//
// The reference is the largest logit of the first block. It rises only where a block's sum shows that it must, which is
// rare. Terms above 1 do no harm, so the maximum of each block is usually not computed. It is computed where a block
// weighs more than all blocks before it, so that a term that dominates the row is 1 and 1 - p keeps its digits.
#pragma once
#include <cmath>

#include "rows.h"
#include "simd.h"

// DMF_CLONES compiles a function once per instruction set, and the version is chosen when the program runs. It works
// only for functions that are no templates. DMF_NO_CLONES switches it off for sanitizers, which can't run before its
// resolvers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(DMF_NO_CLONES)
#define DMF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DMF_HAS_CLONES 1
#else
#define DMF_CLONES
#define DMF_HAS_CLONES 0
#endif

#if defined(__MMX__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#error "compile with -mno-mmx: without it g++ uses MMX registers and no emms, so that the caller's long double is NaN"
#endif

namespace dmf {

constexpr int64_t kBlock = 512;
constexpr double kHigh = 2.0 * kBlock;  // the reference rises where a block's sum reaches this
constexpr double kLog2e = 1.4426950408889634074;

template <class T>
DMF_INLINE float block_max(const T* z, int64_t n) {
  int32_t key = INT32_MIN;
#pragma omp simd reduction(max : key)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t k = to_key(to_float(z[i]));
    key = k > key ? k : key;
  }
  return from_key(key);
}

template <class T>
DMF_INLINE bool has_nan(const T* z, int64_t n) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = 0; i < n; ++i) any |= std::isnan(to_float(z[i]));
  return any != 0;
}

DMF_INLINE int64_t n_blocks(const RowOptions& o) { return (o.vocab + kBlock - 1) / kBlock; }

DMF_INLINE int64_t block_size(int64_t first, const RowOptions& o) {
  return o.vocab - first < kBlock ? o.vocab - first : kBlock;
}

// Returns 2^((x - shift) slope). A term beyond fp32 becomes 2^126, so that the sum shows it.
template <class T>
DMF_INLINE float term_of(T x, float shift, const Slope& slope) {
  const float d = to_float(x) - shift;
  return exp2_of(d > slope.ceiling ? slope.ceiling : d, slope);
}

template <class T>
DMF_INLINE void terms_of(const T* x, int64_t n, float shift, Slope slope, float* e) {
  constexpr int64_t kStep = 64, kAhead = 4096 / sizeof(T);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t k = 0; k < kStep; k += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i + k + kAhead);
#pragma omp simd
    for (int64_t k = i; k < i + kStep; ++k) e[k] = term_of(x[k], shift, slope);
  }
#pragma omp simd
  for (int64_t k = i; k < n; ++k) e[k] = term_of(x[k], shift, slope);
}

// Sums by fours in fp32 and then in fp64, which takes a quarter of the conversions.
DMF_INLINE double quick_sum(const float* e, int64_t n) {
  const int64_t q = n / 4;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < q; ++i) sum += static_cast<double>((e[i] + e[i + q]) + (e[i + 2 * q] + e[i + 3 * q]));
  for (int64_t i = 4 * q; i < n; ++i) sum += e[i];
  return sum;
}

DMF_INLINE double exact_sum(const float* e, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(e[i]);
  return sum;
}

struct RowTotal {
  double reference, sum;  // sum of e^(scale (cap(z) - reference)); reference -inf: a row of nothing but -inf
  DMF_INLINE double lse(const RowOptions& o) const { return o.scale * reference + log(sum); }
};

// Writes cap(z) - reference of a block, formed in fp64 and rounded once.
template <class T>
DMF_INLINE void capped_of(const T* z, int64_t n, double reference, const RowOptions& o, float* out) {
  const double inverse_cap = 1.0 / o.softcap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<float>(o.softcap * tanh_of(static_cast<double>(to_float(z[i])) * inverse_cap) - reference);
}

// Writes the terms of a block of n logits for this reference.
template <class T, bool Cap>
DMF_INLINE void block_terms(const T* z, int64_t n, double reference, const RowOptions& o, const Slope& slope,
                            float* e) {
  if (Cap) {
    float d[kBlock];
    capped_of(z, n, reference, o, d);
    terms_of(d, n, 0.0f, slope, e);
  } else {
    terms_of(z, n, static_cast<float>(reference), slope, e);  // the reference is a logit, so exact
  }
}

// Reads the row. sink.terms(first) returns the place for the terms of a block. sink.add(first, n, terms, their sum,
// reference) takes them. sink.rise(by how much, sum so far) is called before the reference grows, and
// sink.nothing(first, n) for each leading block of nothing but -inf. The sum is NaN if the row holds NaN or +inf.
template <class T, bool Cap, class Sink>
DMF_INLINE RowTotal scan_row(const T* z, const RowOptions& o, Sink& sink) {
  const Slope slope(o.scale * kLog2e);
  const RowTotal bad{NAN, NAN};
  RowTotal total{-INFINITY, 0.0};
  const auto value = [&](float m) { return Cap ? o.softcap * tanh_of(m * (1.0 / o.softcap)) : static_cast<double>(m); };
  for (int64_t first = 0; first < o.vocab; first += kBlock) {
    const int64_t n = block_size(first, o);
    const T* block = z + first;
    if (Cap || total.reference == -INFINITY) {
      const float m = block_max(block, n);
      if (!Cap && m == -INFINITY) {         // a capped -inf is -softcap and counts
        if (has_nan(block, n)) return bad;  // a negative NaN, which compares below -inf as a key
        sink.nothing(first, n);
        continue;
      }
      if (!(m < INFINITY)) return bad;  // +inf or NaN
      if (total.reference == -INFINITY) total.reference = value(m);
    }
    float* e = sink.terms(first);
    block_terms<T, Cap>(block, n, total.reference, o, slope, e);
    double sum = quick_sum(e, n);
    if (!(sum < kHigh) || (sum > total.sum && total.sum > 0)) {
      const float m = block_max(block, n);
      if (std::isnan(sum) || !(m < INFINITY)) return bad;
      const double grown = value(m), by = grown - total.reference;
      if (by > 0) {
        sink.rise(by, total.sum);
        total = {grown, total.sum * exp(-by * o.scale)};
        block_terms<T, Cap>(block, n, grown, o, slope, e);
        sum = quick_sum(e, n);
      }
    }
    // in fp32 a term that dominates the row would swallow the terms beside it
    if (sum > total.sum * 0.0625) sum = exact_sum(e, n);
    sink.add(first, n, e, sum, total.reference);
    total.sum += sum;
  }
  return total;
}

// Returns scale * cap(z).
template <bool Cap>
DMF_INLINE double scaled(float z, const RowOptions& o) {
  return o.scale * (Cap ? o.softcap * tanh_of(z * (1.0 / o.softcap)) : z);
}

}  // namespace dmf
