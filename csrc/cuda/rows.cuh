// This file has what the row kernels share: the division of a row among the threads of a block, and sums over a block.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../batch.h"
#include "device.h"

namespace dmf::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(f16 x) { return __half2float(x); }
__device__ inline unsigned bits_of(__nv_bfloat162 p) {
  unsigned bits;
  memcpy(&bits, &p, 4);
  return bits;
}
__device__ inline float low_of(__nv_bfloat162 p) { return __uint_as_float(bits_of(p) << 16); }
__device__ inline float high_of(__nv_bfloat162 p) { return __uint_as_float(bits_of(p) & 0xffff0000u); }
__device__ inline float low_of(__half2 p) { return to_float(p.x); }
__device__ inline float high_of(__half2 p) { return to_float(p.y); }
__device__ inline __nv_bfloat162 pair_of(float x, float y, bf16) { return __floats2bfloat162_rn(x, y); }
__device__ inline __half2 pair_of(float x, float y, f16) { return __floats2half2_rn(x, y); }
__device__ inline void from_float(float x, float& out) { out = x; }
__device__ inline void from_float(float x, bf16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, f16& out) { out = __float2half_rn(x); }

// --- a row, divided among threads -------------------------------------------------------------------------------

// The number of logits in 16 bytes. A Pack has N adjacent logits, which are one or more 128-bit accesses, or a single
// logit.
template <class T>
constexpr int kWidth = 16 / sizeof(T);

template <class T, int N>
struct Pack {
  T x[N];
};

template <int N>
struct Width {
  static constexpr int value = N;
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

// Stores values that nobody reads soon, so that they are the first to leave the caches.
template <class T, int N>
__device__ inline void store_last(T* p, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *p = pack.x[0];
  } else {
    static_assert(N == kWidth<T>, "");
    uint4 raw;
    memcpy(&raw, &pack, 16);
    __stcs(reinterpret_cast<uint4*>(p), raw);
  }
}

// The type of two 16-bit numbers side by side.
template <class T>
struct PairOf {};
template <>
struct PairOf<bf16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<f16> {
  using type = __half2;
};

// The j-th logit of a pack. Pairs save work: the upper half of a word of two bf16 is a float as it stands.
template <class T, int N>
__device__ inline float at(const Pack<T, N>& pack, int j) {
  if constexpr (sizeof(T) == sizeof(bf16) && N > 1) {
    typename PairOf<T>::type pair;
    memcpy(&pair, &pack.x[j / 2 * 2], 4);
    return j % 2 ? high_of(pair) : low_of(pair);
  } else {
    return to_float(pack.x[j]);
  }
}

template <class T, int N>
__device__ inline Pack<T, N> rounded(const float (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == sizeof(bf16) && N > 1) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const auto pair = pair_of(x[j], x[j + 1], T());
      memcpy(&pack.x[j], &pair, 4);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) from_float(x[j], pack.x[j]);
  }
  return pack;
}

// A row consists of a head up to the first 16-byte boundary, 128-bit packs, and a tail. Head and tail have fewer logits
// than a pack, so V and the row's address may be anything.
struct Cut {
  int vocab, head, packs, tail;  // tail is the index of its first logit
};

template <class T>
__device__ inline Cut cut_row(const T* z, int vocab) {
  const int head = min(static_cast<int>((16 - reinterpret_cast<uintptr_t>(z) % 16) % 16 / sizeof(T)), vocab);
  const int packs = (vocab - head) / kWidth<T>;
  return {vocab, head, packs, head + packs * kWidth<T>};
}

// Cuts logits and their gradient into packs of the gradient. For a 16-bit gradient of an fp32 row a pack has 8 logits,
// which take two loads and one store. If the packs of both are not aligned together, no wide access can serve both, and
// the row goes one logit at a time.
template <class In, class Out>
__device__ inline Cut cut_rows(const In* z, const Out* dz, int vocab) {
  const Cut cut = cut_row(dz, vocab);
  return reinterpret_cast<uintptr_t>(z + cut.head) % 16 == 0 ? cut : Cut{vocab, vocab, 0, vocab};
}

// A warp takes 64 packs of a row at a time, of which each lane has two, 32 apart. The last packs, fewer than 64, and
// head and tail go one by one. A thread gets the same logits every time.
constexpr int kRound = 64, kApart = 32;

// Returns the first column of a part of a row. Parts are whole rounds of packs, but for the head and what the last
// round leaves.
template <class T>
__device__ inline int first_of_part(const T* z, int vocab, int part, int parts) {
  if (part == 0 || part == parts) return part == 0 ? 0 : vocab;
  const Cut cut = cut_row(z, vocab);
  return cut.head + static_cast<int>(int64_t{cut.packs / kRound} * part / parts) * kRound * kWidth<T>;
}

template <class Fetch, int N>
using PackOf = decltype(std::declval<const Fetch&>().template operator()<N>(0));

// Calls body(there, first logit, packs) for packs of T, by all threads of a warp together. there is false for a thread
// that has no packs.
template <class T, class Fetch, class Body>
__device__ inline void for_warp(const Cut& cut, Fetch fetch, Body body) {
  constexpr int W = kWidth<T>;
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % 32;
  const auto one = [&](bool there, int i, auto width) {
    constexpr int N = decltype(width)::value;
    PackOf<Fetch, N> pack[1] = {};
    if (there) pack[0] = fetch.template operator()<N>(i);
    body(there, i, pack);
  };
  const int rounds = cut.packs / kRound * kRound, end = cut.head + rounds * W;
  for (int i = cut.head + ((thread - lane) * 2 + lane) * W; i < end; i += 2 * threads * W) {
    const PackOf<Fetch, W> packs[2] = {fetch.template operator()<W>(i), fetch.template operator()<W>(i + kApart * W)};
    body(true, i, packs);
  }
  for (int i = rounds + thread; i - lane < cut.packs; i += threads) one(i < cut.packs, cut.head + i * W, Width<W>());
  const int singles = cut.head + cut.vocab - cut.tail;
  for (int j = thread; j - lane < singles; j += threads)
    one(j < singles, j < cut.head ? j : cut.tail + j - cut.head, Width<1>());
}

// Calls body(first logit, packs) for this thread's part of the row, with two packs or one. fetch<N>(first logit)
// returns a pack.
template <class T, class Fetch, class Body>
__device__ inline void for_row(const Cut& cut, Fetch fetch, Body body) {
  for_warp<T>(cut, fetch, [&](bool there, int first, const auto& packs) {
    if (there) body(first, packs);
  });
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

// Stores the packs of a round, the first of which begins at p.
template <class T, int N, int K>
__device__ inline void store(T* p, const Pack<T, N> (&packs)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) store(p + k * kApart * N, packs[k]);
}

template <class T>
__device__ inline void zero_row(T* dz, int vocab) {
  for_row<T>(cut_row(dz, vocab), Zero<T>(), [&](int i, const auto& packs) { store(dz + i, packs); });
}

// --- the terms of a row's sum ------------------------------------------------------------------------------------

// A constant as two floats. The first is rounded down, so that the second is above 0 and -inf times both stays -inf.
// The rounding of a single float would bias all terms of a row the same way.
struct Double {
  float high, low;
  DMF_HD explicit Double(double x) {
    high = static_cast<float>(x);
    if (static_cast<double>(high) >= x) high = nextafterf(high, 0.0f);
    low = static_cast<float>(x - high);
  }
  __device__ float times(float x) const { return fmaf(x, high, x * low); }
};

// scale * cap(z) in fp64, which is formed once a row
__device__ inline double scaled(float z, const RowOptions& o) {
  return o.scale * (o.softcap > 0 ? o.softcap * tanh(z / o.softcap) : z);
}

// --- over a block --------------------------------------------------------------------------------------------------

struct Sums {
  double a, b, c;
};

// The memory of one reduction. It must not be used again before a barrier.
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

// Reduces x over the block. The result is the same in every thread, and the order is always the same.
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
__device__ inline double block_sum(double x, Lanes<double>& lanes) {
  return reduce(x, 0.0, lanes, [](double p, double q) { return p + q; });
}
__device__ inline long long block_sum(long long x, Lanes<long long>& lanes) {
  return reduce(x, 0LL, lanes, [](long long p, long long q) { return p + q; });
}
__device__ inline long long block_min(long long x, Lanes<long long>& lanes) {
  return reduce(x, INT64_MAX + 0LL, lanes, [](long long p, long long q) { return p < q ? p : q; });
}

// Returns whether this block is the last of count blocks. What a block wrote is visible before the block is counted, so
// the last block can read what all others wrote.
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
