// The terms of a row's sum, 2^(bits * distance), and their sum over a warp's part of a row.
//
// A distance is that of a logit from the reference, which is the largest logit that the warp has seen. Without a
// softcap it is z - reference. Its product with bits is kept in two parts. The integer part becomes the exponent of a
// float. The rest, at most 1/2, goes to ex2.approx, whose error is at most 2^-22 of a term by PTX's manual; the expf of
// CUDA's library uses it too. Each constant is two floats, since the rounding of one would bias all terms of a row the
// same way.
#pragma once
#include "rows.cuh"

namespace dmf::cuda {

// The constants that all rows of a launch share. The host makes them, and a kernel gets them as parameters, which take
// no registers.
struct Constants {
  Double bits;     // log2(e) * scale, under a softcap times 2c; times a distance it is an exponent of 2
  Double inverse;  // 2 log2(e) / c, with which 2^(inverse z) = e^(2z/c)
  float bound;     // 14c, beyond which tanh(z / c) is +-1 to 1.4e-12
  float step;      // how far below the reference a logit has the term 1 - 2^-23 ln 2, if the cap has slope 1
  float least;     // the distance whose term, 2^-192, is 0 in fp32
  int zero;        // 0, which the compiler does not know
};

inline Constants constants_of(const RowOptions& o) {
  constexpr double kLog2E = 1.4426950408889634;
  const double c = o.softcap > 0 ? o.softcap : 1.0, bits = kLog2E * o.scale;
  const double of_distance = o.softcap > 0 ? 2 * c * bits : bits;
  return {Double(of_distance),
          Double(2 * kLog2E / c),
          static_cast<float>(14 * c),
          static_cast<float>(0x1p-23 / bits),
          static_cast<float>(-192 / of_distance),
          0};
}

// --- 2^x ---------------------------------------------------------------------------------------------------------

constexpr float kShift = 12582912.0f;       // 1.5 * 2^23: added to a float, it leaves an integer in the low bits
constexpr float kBiased = kShift + 127.0f;  // with this bias, the integer is the exponent's field of a float

// 2^x = part * power. The two factors let a sum take one multiply-add for each term.
struct Term {
  float part, power;
  __device__ float value() const { return part * power; }
};

// biased is kBiased, plus n if the power is to be multiplied by 2^n. A term whose power is below 2^-126 is 0, and the
// term of NaN is NaN.
__device__ inline Term term_of(float distance, const Double& bits, float biased = kBiased) {
  const float shifted = fmaxf(fmaf(distance, bits.high, biased), kShift), whole = shifted - biased;
  const float part = fmaf(distance, bits.low, fmaf(distance, bits.high, -whole));
  return {exp2_approx(part), __uint_as_float(__float_as_uint(shifted) << 23)};
}

// Returns x, but only after the packs of a round are loaded. A value that all terms of a round need goes through here,
// so that all loads come before the arithmetic. Without this ptxas puts the second load off until the first pack is
// done.
template <class T, int N, int K>
__device__ inline float after(float x, const Pack<T, N> (&packs)[K], const Constants& c) {
  int bits = __float_as_int(x);
#pragma unroll
  for (int j = 0; j < K * N; j += kWidth<T>) {
    int word;
    memcpy(&word, &packs[j / N].x[j % N], 4);
    bits |= word & c.zero;
  }
  return __int_as_float(bits);
}

// --- distances ---------------------------------------------------------------------------------------------------

template <bool Cap>
struct Reference {
  float z = -FLT_MAX;  // not -inf, from which -inf can't be subtracted

  __device__ explicit Reference(const Constants&) {}
  __device__ void set(const Constants&, float to) { z = to; }
  // Logits below it have terms below 1.
  __device__ float near(const Constants& c) const { return z - c.step; }
  __device__ float distance(const Constants&, float x) const { return x - z; }
};

// (cap(x) - cap(z)) / 2c = (tanh(x/c) - tanh(z/c)) / 2 = s(2z/c) expm1(2(x - z)/c) / (e^(2x/c) + 1), where s is the
// logistic function. This is right to a few 2^-22 of the difference itself, because ex2.approx, rcp.approx and a
// polynomial are each off by 2^-22 at most. A difference of two tanh would be off by an ulp of c, which is too much
// when it is summed over 1,024 tokens.
template <>
struct Reference<true> {
  float z, logistic;

  __device__ explicit Reference(const Constants& c) { set(c, -c.bound); }
  __device__ void set(const Constants& c, float to) {
    z = fmaxf(to, -c.bound);
    logistic = reciprocal(1.0f + exp2_approx(-c.inverse.times(z)));
  }
  __device__ float near(const Constants& c) const { return z - c.step / (4.0f * logistic * (1.0f - logistic)); }

  // full is e^(2x/c), through which NaN reaches the result
  __device__ float distance(const Constants& c, float x, float full) const {
    const float d = fmaxf(x - z, -2.0f * c.bound);
    const float shifted = fmaf(d, c.inverse.high, kBiased), whole = shifted - kBiased;
    const float p = fmaf(d, c.inverse.low, fmaf(d, c.inverse.high, -whole));
    const float power = __uint_as_float(__float_as_uint(shifted) << 23);
    // 2^p - 1 = p * q for |p| <= 1/2, to 1.3e-8 of it
    float q = 1.5453163e-4f;
    q = fmaf(q, p, 1.3390863e-3f);
    q = fmaf(q, p, 9.6180830e-3f);
    q = fmaf(q, p, 5.5503570e-2f);
    q = fmaf(q, p, 2.4022651e-1f);
    q = fmaf(q, p, 6.9314718e-1f);
    const float grown = fmaf(power, p * q, power - 1.0f);
    return grown * reciprocal_approx(full + 1.0f) * logistic;
  }
  __device__ static float full(const Constants& c, float x) { return exp2_approx(c.inverse.times(x)); }
  __device__ float distance(const Constants& c, float x) const { return distance(c, x, full(c, x)); }
};

// --- a sum -------------------------------------------------------------------------------------------------------

// The largest logit of a thread's packs. It ignores NaN, which the sum finds.
template <class T, int N, int K>
__device__ inline float top_of(const Pack<T, N> (&packs)[K]) {
  float top;
  if constexpr (sizeof(T) == 2 && N > 1) {
    using Pair = typename PairOf<T>::type;
    Pair pairs[K * N / 2], highest;
    memcpy(pairs, packs, sizeof(pairs));
    highest = pairs[0];
#pragma unroll
    for (int j = 1; j < K * N / 2; ++j) highest = __hmax2(highest, pairs[j]);
    top = fmaxf(low_of(highest), high_of(highest));
  } else {
    top = at(packs[0], 0);
#pragma unroll
    for (int j = 1; j < K * N; ++j) top = fmaxf(top, at(packs[j / N], j % N));
  }
  return top;
}

// A thread's part of a row's sum of terms. A warp shares the reference, so that it rises rarely. Terms are fp32, and
// packs of them are added up in fp64. Terms that are 1, such as the largest, are counted apart. Next to them an fp32
// sum would lose small terms, always in the same direction, and with them the digits of 1 - p where p is near 1. The
// code looks for them only if a thread of the warp has a logit near the reference or above it.
template <bool Cap, bool Entropy>
struct WarpSum {
  Reference<Cap> reference;
  float near;
  int ones = 0;
  double rest = 0, moment = 0;  // moment is the sum of terms * distances

  __device__ explicit WarpSum(const Constants& c) : reference(c), near(reference.near(c)) {}

  __device__ void rise(const Constants& c, float top) {
    Reference<Cap> higher = reference;
    higher.set(c, top);
    const float delta = higher.distance(c, reference.z), shrink = term_of(delta, c.bits).value();
    const double sum = ones + rest;
    if (Entropy) moment = shrink > 0.0f ? shrink * (moment + delta * sum) : 0.0;
    rest = top == INFINITY ? static_cast<double>(NAN) : shrink * sum;
    ones = 0;
    reference = higher;
    near = reference.near(c);
  }

  // All threads of a warp call this together. there is false for a thread that has no packs.
  template <class T, int N, int K>
  __device__ void add(const Constants& c, bool there, const Pack<T, N> (&packs)[K]) {
    float top = there ? top_of(packs) : -INFINITY, s[K] = {}, m = 0.0f;
    const bool rare = __any_sync(0xffffffffu, !(top < near));
    if (__builtin_expect(rare, false)) {
      for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle(top, mask));
      if (top > reference.z) rise(c, top);
    }
    if (!there) return;
    if (__builtin_expect(rare, false)) {
#pragma unroll
      for (int j = 0; j < K * N; ++j) {
        const float d = reference.distance(c, at(packs[j / N], j % N)), e = term_of(d, c.bits).value();
        if (e == 1.0f)
          ++ones;
        else
          s[j / N] += e;
        if (Entropy) m = fmaf(e, fmaxf(d, -FLT_MAX), m);  // 0 * -inf = 0
      }
    } else {
#pragma unroll
      for (int j = 0; j < K * N; ++j) {
        const float d = reference.distance(c, at(packs[j / N], j % N));
        const Term e = term_of(d, c.bits);
        s[j / N] = fmaf(e.part, e.power, s[j / N]);
        if (Entropy) m = fmaf(e.value(), fmaxf(d, -FLT_MAX), m);
      }
    }
#pragma unroll
    for (int k = 1; k < K; ++k) s[0] += s[k];
    rest += s[0];
    if (Entropy) moment += m;
  }
};

}  // namespace dmf::cuda
