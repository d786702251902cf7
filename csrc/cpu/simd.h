// The arithmetic of one logit as plain C++ that compilers turn into SIMD at any width: exp2 in fp32, tanh in fp64,
// conversions of bf16 and fp16. It uses no intrinsics, so that one source serves AVX-512, AVX2, SSE2 and NEON. The
// instruction set is chosen when the program runs (row_kernels.h).
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define DMF_INLINE inline __attribute__((always_inline))

namespace dmf {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
DMF_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

DMF_INLINE float to_float(float x) { return x; }
DMF_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
DMF_INLINE float to_float(fp16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & (0x1fu << 23);
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t special = normal + ((128u - 16u) << 23);  // inf, NaN
  const float subnormal = bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23);
  uint32_t r = exponent == (0x1fu << 23) ? special : normal;
  r = exponent == 0 ? bit_cast<uint32_t>(subnormal) : r;
  return bit_cast<float>(r | (static_cast<uint32_t>(x.bits & 0x8000) << 16));
}

// Both round to nearest even, as torch does.
DMF_INLINE void from_float(float x, float& out) { out = x; }
DMF_INLINE void from_float(float x, bf16& out) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
// Takes a finite x. This halves the work in bf16, because NaN needs no check.
template <class T>
DMF_INLINE void from_finite(float x, T& out) {
  from_float(x, out);
}
DMF_INLINE void from_finite(float x, bf16& out) {
  const uint32_t u = bit_cast<uint32_t>(x);
  out.bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
DMF_INLINE void from_float(float x, fp16& out) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u & 0x80000000u, a = u ^ sign;
  // below 2^-14 the addition of 0.5 rounds the mantissa to the place where fp16 subnormals end
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(a) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t normal = (a - ((127u - 15u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  uint32_t r = a < (113u << 23) ? subnormal : normal;
  r = a >= (143u << 23) ? 0x7c00u : r;  // 65536 and more
  r = a > 0x7f800000u ? 0x7e00u : r;
  out.bits = static_cast<uint16_t>(r | (sign >> 16));
}

// Maps floats to integers in the same order. Integer maxima vectorise without -ffinite-math-only, and a positive NaN
// comes out above +inf instead of being lost.
DMF_INLINE int32_t to_key(float x) {
  const int32_t i = bit_cast<int32_t>(x);
  return i ^ ((i >> 31) & 0x7fffffff);
}
DMF_INLINE float from_key(int32_t k) { return bit_cast<float>(k ^ ((k >> 31) & 0x7fffffff)); }

// A slope for exp2_of, which returns exp2(d * slope) for d * slope <= 126, 0 below 2^-126, and NaN for NaN. The slope
// is stored as hi + lo, because rounding log2(e) to fp32 would tilt every term the same way. The polynomial has degree
// 6 (2e-9), because the errors of degree 5 can't be relied on to cancel. With FMA, d * hi - n is exact before its one
// rounding.
struct Slope {
  float hi, lo, floor, ceiling;  // the result is 0 for d below floor, and right up to ceiling
  explicit Slope(double slope)
      : hi(static_cast<float>(slope)),
        lo(static_cast<float>(slope - hi)),
        floor(static_cast<float>(std::fmax(-126.0 / slope, -FLT_MAX))),  // -inf is below it
        ceiling(static_cast<float>(std::fmin(126.0 / slope, FLT_MAX))) {}
};

DMF_INLINE float exp2_of(float d, const Slope& s) {
  constexpr float kMagic = 12582912.0f + 127.0f;  // 1.5 * 2^23: low mantissa bits hold n + 127
  const float shifted = d * s.hi + kMagic;
  const float n = shifted - kMagic;
  float r = d * s.hi - n;
  r = d * s.lo + r;
  float p = 0x1.41fbbcp-13f;
  p = p * r + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  const float e = p * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
  return d < s.floor ? 0.0f : e;
}

// Returns tanh in fp64 to 1e-14. A capped logit is around 30, where fp32 is too coarse for a sum over 1,024 tokens.
DMF_INLINE double tanh_of(double x) {
  constexpr double kMagic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52
  double y = x * 2.8853900817779268;                      // 2 log2(e)
  y = y > 60.0 ? 60.0 : (y < -60.0 ? -60.0 : y);
  const double shifted = y + kMagic;
  const double r = y - (shifted - kMagic);
  double p = -1.4470962243582224e-10;
  p = p * r + 6.813930149428159e-09;
  p = p * r + 1.0220091130251545e-07;
  p = p * r + 1.321721127195373e-06;
  p = p * r + 1.5252622109649986e-05;
  p = p * r + 0.00015403526081619794;
  p = p * r + 0.0013333558284029216;
  p = p * r + 0.009618129112183274;
  p = p * r + 0.05550410866403049;
  p = p * r + 0.24022650695892905;
  p = p * r + 0.6931471805599604;
  p = p * r + 1.0;
  const double e = p * bit_cast<double>(bit_cast<uint64_t>(shifted) << 52);
  return 1.0 - 2.0 / (e + 1.0);
}

}  // namespace dmf
