// sample_rows fuses scaling, softcap, softmax, the draw and its log-probability. It reads every logit once (16 bytes of
// a tile twice if a row and its tiles of 512 are not aligned) and writes nothing per logit. Less is impossible, since
// each logit counts in the sum. The sums of the tiles wait in shared memory. A uniform number picks a tile by these
// sums, the tile is read a second time for its terms, and the number picks a token in it.
//
// A block has one row and a warp has one tile, and loads the next tile while it forms the terms of this one. The thread
// that adds up a logit, and the order of the sum, depend on the logit's place in the row and not on the row's address;
// if rows are not aligned, a tile passes through shared memory. So the draw and its log-probability depend on the
// logits alone. A token of probability 0 is never drawn, because its term adds nothing to the running sum, which must
// exceed the target.
#include <climits>

#include "../random.h"
#include "loss.h"
#include "plan.h"
#include "rows.cuh"

namespace dmf::cuda {
namespace {

constexpr int kTile = 512, kWarps = 16;
constexpr int kTerms = kTile / 32;      // the terms of a thread
constexpr int64_t kUnasked = 48 << 10;  // the shared memory that a block has on every device without asking

struct TileSum {
  double sum;
  float reference;
};

template <class T>
struct Shared {
  alignas(16) T tile[kWarps][kTile + kWidth<T>];
  float terms[kTile];
  Lanes<float> top;
  Lanes<long long> bad;
  double log_total;
  bool last;
};

// --- a tile ---------------------------------------------------------------------------------------------------------

// A thread's packs of a tile, of 16 bytes each. A tile that is not aligned ends in one more pack, which lane 0 has.
template <class T>
struct Packs {
  static constexpr int kOwn = kTerms / kWidth<T>;
  Pack<T, kWidth<T>> own[kOwn], end;
};

// The place in a tile of a thread's i-th logit.
template <class T>
__device__ int place(int i) {
  constexpr int W = kWidth<T>;
  return (i / W * 32 + static_cast<int>(threadIdx.x % 32)) * W + i % W;
}

// Loads a pack in which logits outside the row are -inf.
template <class T>
__device__ Pack<T, kWidth<T>> load_within(const T* z, int first, int vocab) {
  Pack<T, kWidth<T>> pack;
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) {
    from_float(-INFINITY, pack.x[j]);
    if (first + j >= 0 && first + j < vocab) pack.x[j] = z[first + j];
  }
  return pack;
}

// Loads a thread's packs of a tile. before is the number of logits from the last 16-byte boundary to the tile.
template <class T>
__device__ void fetch(Packs<T>& packs, const T* z, int tile, int before, int vocab) {
  constexpr int W = kWidth<T>, K = Packs<T>::kOwn;
  const int first = tile * kTile - before;
  const bool has_end = before && threadIdx.x % 32 == 0;
  if (first >= 0 && first + kTile + W <= vocab) {
    const T* from = z + first + place<T>(0);
#pragma unroll
    for (int k = 0; k < K; ++k) packs.own[k] = load<W>(from + k * 32 * W);
    if (has_end) packs.end = load<W>(from + kTile);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) packs.own[k] = load_within(z, first + place<T>(k * W), vocab);
    if (has_end) packs.end = load_within(z, first + kTile, vocab);
  }
}

// Writes the thread's logits of the tile to x.
template <class T>
__device__ void spread(const Packs<T>& packs, int before, T* shared, float (&x)[kTerms]) {
  constexpr int W = kWidth<T>, K = Packs<T>::kOwn;
  if (before == 0) {
#pragma unroll
    for (int i = 0; i < kTerms; ++i) x[i] = to_float(packs.own[i / W].x[i % W]);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) store(shared + place<T>(k * W), packs.own[k]);
  if (threadIdx.x % 32 == 0) store(shared + kTile, packs.end);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTerms; ++i) x[i] = to_float(shared[before + place<T>(i)]);
  __syncwarp();  // the tile must be read before the next one overwrites it
}

// The log of a term of the softmax in nats, scale * (cap(z) - cap(reference)).
template <bool Cap>
struct Exponent {
  Double scale;
  float reference = -FLT_MAX;  // not -inf, from which -inf can't be subtracted

  __device__ explicit Exponent(const RowOptions& o) : scale(o.scale) {}
  __device__ static float clamp(float z) { return z; }
  __device__ void set(float z) { reference = z; }
  __device__ float operator()(float z) const { return scale.times(z - reference); }
};

// cap(z) - cap(r) = c (tanh(z/c) - tanh(r/c)) = 2c s(2r/c) expm1(2(z - r)/c) / (e^(2z/c) + 1), where s is the logistic
// function. In fp32 this is right to a few ulps of the difference itself. A difference of two tanh is off by an ulp of
// c, which is too much when it is summed over 1,024 tokens, and most GPUs are too slow in fp64 to use it for each
// logit.
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
};

// The term of a logit. A place outside the row has the term 0, even under a softcap, where a logit of -inf has another.
template <class T, bool Cap>
__device__ float term(const Exponent<Cap>& exponent, float z, int i, int n) {
  const float e = expf(exponent(z));  // formed even if it is not used, since a branch costs more
  return Cap && place<T>(i) >= n ? 0.0f : e;
}

// The sum of a tile with n logits. Terms are fp32, packs of them are added up in fp64, and terms that are 1 are counted
// apart, as in terms.cuh.
template <class T, bool Cap>
__device__ TileSum sum_of(const float (&x)[kTerms], int n, Exponent<Cap>& exponent) {
  float top = -FLT_MAX;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) top = fmaxf(top, x[i]);  // passes over NaN, which is found in the sum
  for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle(top, mask));
  exponent.set(top);
  int ones = 0;
  double sum = 0;
#pragma unroll
  for (int first = 0; first < kTerms; first += kWidth<T>) {
    float of_pack = 0.0f;
#pragma unroll
    for (int i = first; i < first + kWidth<T>; ++i) {
      const float e = term<T>(exponent, x[i], i, n);
      if (e == 1.0f)
        ++ones;
      else
        of_pack += e;
    }
    sum += of_pack;
  }
  sum += ones;
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle(sum, mask);
  return {top == INFINITY ? static_cast<double>(NAN) : sum, top};
}

// --- picking --------------------------------------------------------------------------------------------------------

// n weights, of which each lane of a warp has a 32nd, in order. The sum of a lane, and the running sum over the lanes
// up to it, are formed in an order that depends on n alone.
template <class Weight>
struct Scan {
  int first, last;
  double own = 0, before, through;
  Weight weight;

  __device__ Scan(int n, Weight weight) : weight(weight) {
    const int lane = threadIdx.x % 32, each = (n + 31) / 32;
    first = min(lane * each, n), last = min(first + each, n);
    for (int i = first; i < last; ++i) own += weight(i);
    through = own;
    for (int k = 1; k < 32; k *= 2) {
      const double x = __shfl_up_sync(0xffffffffu, through, k);
      if (lane >= k) through += x;
    }
    before = __shfl_up_sync(0xffffffffu, through, 1);
    if (lane == 0) before = 0;
  }
  __device__ double total() const { return __shfl_sync(0xffffffffu, through, 31); }

  // Does what pick of sample.h does, with the result in every lane. The result is 0 if a weight is NaN.
  __device__ int pick(double& target) const {
    const int lane = threadIdx.x % 32;
    // The first lane whose running sum exceeds the target is picked, or else the last lane. A lane is left out if all
    // of its weights are 0.
    int of = !(own > 0) ? 96 : through > target ? lane : 64 - lane;
    for (int mask = 16; mask > 0; mask /= 2) of = min(of, shuffle(of, mask));
    of = of < 32 ? of : (64 - of) & 31;
    double rest = target - before;
    const int picked = lane == of ? first + dmf::pick(last - first, rest, [&](int i) { return weight(first + i); }) : 0;
    target = __shfl_sync(0xffffffffu, rest, of);
    return __shfl_sync(0xffffffffu, picked, of);
  }
};

template <class T, bool Cap>
__global__ void __launch_bounds__(kWarps * 32, 2)
    sample_rows(SampleRows s, int64_t* tokens, double* log_prob, unsigned* counter, long long* status) {
  DMF_SHARED(Shared<T>, shared);
  DMF_DYNAMIC_SHARED(memory);
  const RowOptions& o = s.options;
  const int64_t row = blockIdx.x;
  const int vocab = static_cast<int>(o.vocab), tiles = (vocab + kTile - 1) / kTile;
  // the shuffle tells the compiler that the number is the same in a warp
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), warps = blockDim.x / 32;
  TileSum* sums = reinterpret_cast<TileSum*>(memory);
  const T* z = reinterpret_cast<const T*>(s.logits) + row * s.stride_row;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T));

  Exponent<Cap> exponent(o);
  Packs<T> packs;
  float x[kTerms], highest = -INFINITY;
  const auto add = [&](int k) {
    const TileSum sum = sum_of<T>(x, vocab - k * kTile, exponent);
    if (threadIdx.x % 32 == 0) sums[k] = sum;
    highest = fmaxf(highest, sum.reference);
  };
  int k = warp;  // there are no more warps than tiles
  fetch(packs, z, k, before, vocab);
  spread(packs, before, shared.tile[warp], x);
  for (; k + warps < tiles; k += warps) {
    if (!Cap) fetch(packs, z, k + warps, before, vocab);
    add(k);
    if (Cap) fetch(packs, z, k + warps, before, vocab);  // its arithmetic needs the registers, and bounds it
    spread(packs, before, shared.tile[warp], x);
  }
  add(k);
  highest = block_max(highest, shared.top);
  exponent.set(highest);
  for (int k = threadIdx.x; k < tiles; k += blockDim.x)
    if (sums[k].sum != 0.0) sums[k].sum *= exp(static_cast<double>(exponent(sums[k].reference)));  // NaN stays
  __syncthreads();
  if (warp == 0) {
    const Scan scan(tiles, [&](int k) { return sums[k].sum; });
    const double total = scan.total();
    if (threadIdx.x == 0) shared.log_total = scaled(highest, o) + log(total);  // where it takes no register
    const auto id = static_cast<uint64_t>(s.row_ids ? s.row_ids[row] : row);
    double target = (s.uniforms ? s.uniforms[row] : uniform(s.seed, id, s.step)) * total;
    const int picked = scan.pick(target), n = min(kTile, vocab - picked * kTile);
    fetch(packs, z, picked, before, vocab);
    spread(packs, before, shared.tile[0], x);
    exponent.set(sums[picked].reference);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) shared.terms[place<T>(i)] = term<T>(exponent, x[i], i, n);
    __syncwarp();
    const Scan terms(n, [&](int i) { return static_cast<double>(shared.terms[i]); });
    target *= terms.total() / sums[picked].sum;  // the total of the tile itself, in whose sum packs are rounded
    const int token = terms.pick(target);
    if (threadIdx.x == 0) {
      const bool good = isfinite(shared.log_total);
      tokens[row] = good ? picked * kTile + token : 0;
      log_prob[row] =
          good ? scaled(to_float(z[picked * kTile + token]), o) - shared.log_total : static_cast<double>(NAN);
    }
  }
  if (!is_last(counter, gridDim.x, shared.last)) return;
  long long bad = LLONG_MAX;
  for (int64_t i = threadIdx.x; i < s.rows; i += blockDim.x)
    if (isnan(log_prob[i])) bad = min(bad, static_cast<long long>(i));
  bad = block_min(bad, shared.bad);
  if (threadIdx.x == 0) *status = bad == LLONG_MAX ? -1 : bad;
}

template <class T>
void launch(const SampleRows& s, int64_t* tokens, double* log_prob, const Workspace& w) {
  const int64_t shared = (s.options.vocab + kTile - 1) / kTile * static_cast<int64_t>(sizeof(TileSum));
  const auto kernel = s.options.softcap > 0 ? sample_rows<T, true> : sample_rows<T, false>;
  if (s.rows > INT_MAX) throw std::runtime_error("too many rows");
  if (shared + int64_t{sizeof(Shared<T>)} > kUnasked) {
    const int64_t available = shared_limit(w.device) - int64_t{sizeof(Shared<T>)};
    if (shared > available) throw std::runtime_error("too long rows");
    allow_shared(kernel, available);
  }
  const int64_t tiles = shared / static_cast<int64_t>(sizeof(TileSum));
  const int warps = static_cast<int>(std::min<int64_t>(tiles, kWarps));
  DMF_LAUNCH(kernel, static_cast<unsigned>(s.rows), warps * 32, static_cast<size_t>(shared),
             static_cast<cudaStream_t>(w.stream), s, tokens, log_prob, w.counters,
             reinterpret_cast<long long*>(w.status));
  check(cudaGetLastError());
}

}  // namespace

void sample(const SampleRows& s, int64_t* tokens, double* log_prob, const Workspace& w) {
  if (s.rows == 0) return;
  const OnDevice guard(w.device);
  if (s.dtype == DType::f32)
    launch<float>(s, tokens, log_prob, w);
  else if (s.dtype == DType::bf16)
    launch<bf16>(s, tokens, log_prob, w);
  else
    launch<f16>(s, tokens, log_prob, w);
}

}  // namespace dmf::cuda
