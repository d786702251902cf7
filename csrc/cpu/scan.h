// How the row kernels read a row: in blocks of 512 logits against a running maximum, which grows in about
// log(V / 512) of the blocks, so that rescaling is rare. What is made of the blocks is the caller's: their sum
// (rows.cpp), or the sum of each (sample.cpp).
#pragma once
#include <cmath>

#include "rows.h"
#include "simd.h"

// A function compiled once per instruction set, chosen when the program runs. It takes no templates. Sanitizers can't
// run before the resolvers that it needs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(DMF_NO_CLONES)
#define DMF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DMF_HAS_CLONES 1
#else
#define DMF_CLONES
#define DMF_HAS_CLONES 0
#endif

namespace dmf {

constexpr int64_t kBlock = 512;
constexpr double kLog2e = 1.4426950408889634074;

template <class T>
DMF_INLINE float block_max(const T* z, int64_t n, float* buffer) {
  int32_t key = INT32_MIN;
#pragma omp simd reduction(max : key)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(z[i]);
    if (sizeof(T) != sizeof(float)) buffer[i] = x;
    const int32_t k = to_key(x);
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

// What a block of logits looks like to a sum: floats with log2 of the term = (x[i] - shift) * slope.
struct Block {
  const float* x;
  float shift;
  int64_t n;
};

// The block from ``first`` on, against ``reference``, the largest cap(z) so far. Without a softcap x is z; with one, it
// is cap(z) - reference, formed in fp64 and rounded once. In 16 bits and without a softcap, buffer must hold z already.
template <class T, bool Cap>
DMF_INLINE Block block_at(const T* z, int64_t n, double reference, const RowOptions& o, float* buffer) {
  const float* x = sizeof(T) == sizeof(float) ? reinterpret_cast<const float*>(z) : buffer;
  if (!Cap) return {x, static_cast<float>(reference), n};  // exact: a logit
  const double inverse_cap = 1.0 / o.softcap;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = static_cast<float>(o.softcap * tanh_of(static_cast<double>(x[i]) * inverse_cap) - reference);
  return {buffer, 0.0f, n};
}

DMF_INLINE int64_t block_size(int64_t first, const RowOptions& o) {
  return o.vocab - first < kBlock ? o.vocab - first : kBlock;
}

// Calls sum.rise(r) where the largest cap(z) so far grows to r, then sum.add(block, its first logit); a block of
// nothing but -inf is left out. False if the row holds NaN or +inf.
template <class T, bool Cap, class Sum>
DMF_INLINE bool scan_row(const T* z, const RowOptions& o, Sum& sum) {
  float max = -INFINITY;
  double reference = -INFINITY;
  float buffer[kBlock];
  for (int64_t first = 0; first < o.vocab; first += kBlock) {
    const int64_t n = block_size(first, o);
    const float m = block_max(z + first, n, buffer);
    if (!Cap && m == -INFINITY) {               // a capped -inf is -softcap, and counts
      if (has_nan(z + first, n)) return false;  // a negative NaN, which compares below -inf as a key
      continue;
    }
    if (!(m < INFINITY)) return false;  // +inf or NaN
    if (m > max || (Cap && reference == -INFINITY)) {
      max = m;
      reference = Cap ? o.softcap * tanh_of(m * (1.0 / o.softcap)) : m;
      sum.rise(reference);
    }
    sum.add(block_at<T, Cap>(z + first, n, reference, o, buffer), first);
  }
  return true;
}

// scale * cap(z)
template <bool Cap>
DMF_INLINE double scaled(float z, const RowOptions& o) {
  return o.scale * (Cap ? o.softcap * tanh_of(z * (1.0 / o.softcap)) : z);
}

}  // namespace dmf
