// What the row kernels share: how the threads of a block divide a row, the terms of its sum, sums over a block.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../batch.h"
#include "device.h"

namespace dmf::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, bf16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, f16& out) { out = __float2half_rn(x); }

// --- a row, divided among threads -------------------------------------------------------------------------------

// N logits that lie together: 128-bit accesses, as many as N fills, or a single logit.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

template <class T, int N>
struct Pack {
  T x[N];
};

template <int N, class T>
__device__ inline Pack<T, N> load(const T* p) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.x[0] = *p;
  } else {
#pragma unroll
    for (int j = 0; j < N; j += kWidth<T>) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p + j);
      memcpy(pack.x + j, &raw, 16);
    }
  }
  return pack;
}

template <class T, int N>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *p = pack.x[0];
  } else {
    static_assert(N == kWidth<T>, "");
    uint4 raw;
    memcpy(&raw, &pack, 16);
    *reinterpret_cast<uint4*>(p) = raw;
  }
}

// A row is a head up to the first 16-byte boundary, 128-bit packs, and a tail. Head and tail have fewer logits than
// a pack: V and the row's address may be anything.
struct Cut {
  int vocab, head, packs, tail;  // tail: its first logit
};

template <class T>
__device__ inline Cut cut_row(const T* z, int vocab) {
  const int head = min(static_cast<int>((16 - reinterpret_cast<uintptr_t>(z) % 16) % 16 / sizeof(T)), vocab);
  const int packs = (vocab - head) / kWidth<T>;
  return {vocab, head, packs, head + packs * kWidth<T>};
}

// Of logits and their gradient, into packs of the gradient: of an fp32 row 8 logits for a 16-bit gradient, two loads
// and one store. Where the packs of both are not aligned nothing wide can serve both: one logit at a time.
template <class In, class Out>
__device__ inline Cut cut_rows(const In* z, const Out* dz, int vocab) {
  const Cut cut = cut_row(dz, vocab);
  return reinterpret_cast<uintptr_t>(z + cut.head) % 16 == 0 ? cut : Cut{vocab, vocab, 0, vocab};
}

// body(first logit, pack) for this thread's part of the row, in packs of T; fetch<N>(first logit) brings one. Two packs
// are under way at a time. A thread gets the same logits every time.
template <class T, class Fetch, class Body>
__device__ inline void for_row(const Cut& cut, Fetch fetch, Body body) {
  constexpr int W = kWidth<T>;
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int i = thread; i < cut.head; i += threads) body(i, fetch.template operator()<1>(i));
  int i = thread;
  for (; i + threads < cut.packs; i += 2 * threads) {
    const int first = cut.head + i * W, second = first + threads * W;
    const auto a = fetch.template operator()<W>(first), b = fetch.template operator()<W>(second);
    body(first, a);
    body(second, b);
  }
  if (i < cut.packs) body(cut.head + i * W, fetch.template operator()<W>(cut.head + i * W));
  for (int j = cut.tail + thread; j < cut.vocab; j += threads) body(j, fetch.template operator()<1>(j));
}

template <class T>
struct FromRow {
  const T* row;
  template <int N>
  __device__ Pack<T, N> operator()(int i) const {
    return load<N>(row + i);
  }
};

template <class T>
struct Zero {
  template <int N>
  __device__ Pack<T, N> operator()(int) const {
    Pack<T, N> pack;
    for (int j = 0; j < N; ++j) from_float(0.0f, pack.x[j]);
    return pack;
  }
};

template <class T>
__device__ inline void zero_row(T* dz, int vocab) {
  for_row<T>(cut_row(dz, vocab), Zero<T>(), [&](int i, const auto& pack) { store(dz + i, pack); });
}

// --- the terms of a row's sum ------------------------------------------------------------------------------------

// A constant as two floats, the first rounded down: so the second is above 0, and -inf times both stays -inf. The
// rounding of a single float would tilt every term of a row the same way.
struct Double {
  float high, low;
  __device__ explicit Double(double x) {
    high = __double2float_rd(x);
    if (static_cast<double>(high) == x) high = nextafterf(high, 0.0f);
    low = static_cast<float>(x - high);
  }
  __device__ float times(float x) const { return fmaf(x, high, x * low); }
};

// log of a term of the softmax, in nats: scale * (cap(z) - cap(reference)).
template <bool Cap>
struct Exponent {
  Double scale;
  float reference = -FLT_MAX;  // not -inf, from which -inf can't be subtracted

  __device__ explicit Exponent(const RowOptions& o) : scale(o.scale) {}
  __device__ static float clamp(float z) { return z; }
  __device__ void set(float z) { reference = z; }
  __device__ float operator()(float z) const { return scale.times(z - reference); }
};

// cap(z) - cap(r) = c (tanh(z/c) - tanh(r/c)) = 2c s(2r/c) expm1(2(z - r)/c) / (e^(2z/c) + 1), s the logistic function:
// right to a few ulps of the difference itself, in fp32. tanh's own difference is off by an ulp of c, too much to be
// summed up over 1,024 tokens, and fp64 for each logit is what most GPUs have next to none of.
template <>
struct Exponent<true> {
  Double inverse, factor;  // 2 / c; scale * 2c
  float bound;             // beyond it tanh is +-1
  float reference, logistic;

  __device__ explicit Exponent(const RowOptions& o)
      : inverse(2.0 / o.softcap), factor(2.0 * o.scale * o.softcap), bound(30.0 * o.softcap) {
    set(-FLT_MAX);
  }
  __device__ float clamp(float z) const { return z < -bound ? -bound : (z > bound ? bound : z); }  // NaN stays
  __device__ void set(float z) {
    reference = clamp(z);
    logistic = 1.0f / (1.0f + expf(-inverse.times(reference)));
  }
  __device__ float operator()(float z) const {
    z = clamp(z);
    const float grown = expm1f(inverse.times(z - reference)) / (expf(inverse.times(z)) + 1.0f);
    return factor.times(grown * logistic);
  }
  // 1 - tanh^2; of the logit as it is, so that -inf gives 0
  __device__ float slope(float z) const {
    const float u = expf(inverse.times(fminf(z, bound))), r = 1.0f / (u + 1.0f);
    return 4.0f * r * (u * r);
  }
};

// scale * cap(z), once a row
__device__ inline double scaled(float z, const RowOptions& o) {
  return o.scale * (o.softcap > 0 ? o.softcap * tanh(z / o.softcap) : z);
}

// A thread's part of a row's sum of e^exponent, against the largest logit that it has seen. Terms are fp32, packs of
// them are added up in fp64. Terms that are 1, such as the largest, are counted apart: beside them an fp32 sum would
// lose small terms, all in one direction, and with them the digits of 1 - p where p is near 1.
template <bool Cap, bool Entropy>
struct PartialSum {
  Exponent<Cap> exponent;
  int ones = 0;
  double rest = 0, moment = 0;  // moment: sum of e^x x

  __device__ explicit PartialSum(const RowOptions& o) : exponent(o) {}

  __device__ void rise(float top) {
    Exponent<Cap> higher = exponent;
    higher.set(top);
    const float delta = higher(exponent.reference), shrink = expf(delta);
    const double sum = ones + rest;
    if (Entropy) moment = shrink > 0.0f ? shrink * (moment + delta * sum) : 0.0;
    rest = top == INFINITY ? static_cast<double>(NAN) : shrink * sum;
    ones = 0;
    exponent = higher;
  }

  template <class T, int N>
  __device__ void add(const Pack<T, N>& pack) {
    float z[N], top = -FLT_MAX;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = to_float(pack.x[j]);
      top = fmaxf(top, z[j]);  // passes over NaN, which is found in the sum
    }
    top = top == INFINITY ? top : exponent.clamp(top);
    if (top > exponent.reference) rise(top);
    float s = 0.0f, m = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = exponent(z[j]), e = expf(x);
      if (e == 1.0f)
        ++ones;
      else
        s += e;
      if (Entropy) m += e > 0.0f ? e * x : 0.0f;
    }
    rest += s;
    if (Entropy) moment += m;
  }
};

// --- over a block --------------------------------------------------------------------------------------------------

struct Sums {
  double a, b, c;
};

// Memory of one reduction: not to be used again before a barrier.
template <class V>
struct Lanes {
  V of_warp[32];
};

template <class V>
__device__ inline V shuffle(V x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <>
__device__ inline Sums shuffle(Sums x, int mask) {
  return {shuffle(x.a, mask), shuffle(x.b, mask), shuffle(x.c, mask)};
}

// The same in every thread, and always in the same order.
template <class V, class Op>
__device__ inline V reduce(V x, V nothing, Lanes<V>& lanes, Op op) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int mask = 16; mask > 0; mask /= 2) x = op(x, shuffle(x, mask));
  if (lane == 0) lanes.of_warp[warp] = x;
  __syncthreads();
  x = lane < warps ? lanes.of_warp[lane] : nothing;
  for (int mask = 16; mask > 0; mask /= 2) x = op(x, shuffle(x, mask));
  return x;
}

__device__ inline float block_max(float x, Lanes<float>& lanes) {
  return reduce(x, -INFINITY, lanes, [](float p, float q) { return fmaxf(p, q); });
}
__device__ inline Sums block_sum(Sums x, Lanes<Sums>& lanes) {
  return reduce(x, Sums{0, 0, 0}, lanes, [](Sums p, Sums q) { return Sums{p.a + q.a, p.b + q.b, p.c + q.c}; });
}
__device__ inline long long block_sum(long long x, Lanes<long long>& lanes) {
  return reduce(x, 0LL, lanes, [](long long p, long long q) { return p + q; });
}
__device__ inline long long block_min(long long x, Lanes<long long>& lanes) {
  return reduce(x, INT64_MAX + 0LL, lanes, [](long long p, long long q) { return p < q ? p : q; });
}

// Whether the last of count blocks is here. All that the block wrote stands before it is counted, and all that the
// others wrote can be read after.
__device__ inline bool is_last(unsigned* counter, int64_t count, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == static_cast<unsigned>(count - 1);
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace dmf::cuda
