// sample_rows fuses scaling, softcap, softmax, the draw and its log-probability. It reads every logit once (16 bytes
// twice where a row and its tiles of 512 are not aligned) and writes nothing per logit: less is impossible, since each
// counts in the sum. The sums of the tiles wait in shared memory; a uniform number picks a tile from them, which is
// read a second time for its terms, and a token in it.
//
// A block has one row, a warp a tile. A tile passes through shared memory, so that which thread adds up which logits
// does not depend on the row's address: the draw and its log-probability are functions of the logits alone. A token of
// probability 0 is never drawn: its term adds nothing to the running sum, which must exceed the target.
#include <climits>

#include "../random.h"
#include "loss.h"
#include "plan.h"
#include "rows.cuh"

namespace dmf::cuda {
namespace {

constexpr int kTile = 512, kWarps = 8;
constexpr int64_t kUnasked = 48 << 10;  // shared memory that a block has on every device

struct TileSum {
  double sum;
  float reference;
};

template <class T>
struct Shared {
  alignas(16) T tile[kWarps][kTile + 2 * kWidth<T>];
  float terms[kTile];
  Lanes<float> top;
  Lanes<long long> bad;
  double target, log_total;
  int picked;
  bool last;
};

// Copies logits [first, last) of a row to shared memory and returns where the first one is there.
template <class T>
__device__ const T* fetch(const T* z, int first, int last, int vocab, T* tile) {
  const T* from = z + first;
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const int packs = (before + last - first + kWidth<T> - 1) / kWidth<T>;
  for (int pack = threadIdx.x % 32; pack < packs; pack += 32) {
    const int i = first - before + pack * kWidth<T>;  // may reach into the next tile, not beyond the row
    if (i >= 0 && i + kWidth<T> <= vocab)
      store(tile + pack * kWidth<T>, load<kWidth<T>>(z + i));
    else
      for (int j = max(i, 0); j < min(i + kWidth<T>, vocab); ++j) tile[j - first + before] = z[j];
  }
  __syncwarp();
  return tile + before;
}

template <class T, bool Cap>
__global__ void __launch_bounds__(kWarps * 32)
    sample_rows(SampleRows s, int64_t* tokens, double* log_prob, unsigned* counter, long long* status) {
  DMF_SHARED(Shared<T>, shared);
  DMF_DYNAMIC_SHARED(memory);
  const RowOptions& o = s.options;
  const int64_t row = blockIdx.x;
  const int vocab = static_cast<int>(o.vocab), tiles = (vocab + kTile - 1) / kTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  TileSum* sums = reinterpret_cast<TileSum*>(memory);
  const T* z = reinterpret_cast<const T*>(s.logits) + row * s.stride_row;

  float highest = -INFINITY;
  for (int k = warp; k < tiles; k += kWarps) {
    const int first = k * kTile, n = min(kTile, vocab - first);
    const T* x = fetch(z, first, first + n, vocab, shared.tile[warp]);
    PartialSum<Cap, false> sum(o);
    for (int i = lane; i < n; i += 32) sum.add(Pack<T, 1>{{x[i]}});
    float top = sum.exponent.reference;
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle(top, mask));
    if (top > sum.exponent.reference) sum.rise(top);
    double total = sum.ones + sum.rest;
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle(total, mask);
    if (lane == 0) sums[k] = {total, top};
    highest = fmaxf(highest, top);
    __syncwarp();  // the tile is read before the next one comes
  }
  highest = block_max(highest, shared.top);
  Exponent<Cap> exponent(o);
  exponent.set(highest);
  for (int k = threadIdx.x; k < tiles; k += blockDim.x)
    if (sums[k].sum != 0.0) sums[k].sum *= exp(static_cast<double>(exponent(sums[k].reference)));  // NaN stays
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto weight = [&](int k) { return sums[k].sum; };
    double total = 0;
    for (int k = 0; k < tiles; ++k) total += weight(k);
    const auto id = static_cast<uint64_t>(s.row_ids ? s.row_ids[row] : row);
    double target = (s.uniforms ? s.uniforms[row] : uniform(s.seed, id, s.step)) * total;
    const int k = pick(tiles, target, weight);
    shared.picked = k;
    shared.target = target / exp(static_cast<double>(exponent(sums[k].reference)));
    shared.log_total = scaled(highest, o) + log(total);
  }
  __syncthreads();
  const bool good = isfinite(shared.log_total);
  const int first = shared.picked * kTile, n = min(kTile, vocab - first);
  exponent.set(sums[shared.picked].reference);
  if (warp == 0) {
    const T* x = fetch(z, first, first + n, vocab, shared.tile[0]);
    for (int i = lane; i < n; i += 32) shared.terms[i] = expf(exponent(to_float(x[i])));
    __syncwarp();
    if (lane == 0) {
      double target = shared.target;
      const int token = good ? pick(n, target, [&](int i) { return static_cast<double>(shared.terms[i]); }) : 0;
      tokens[row] = good ? first + token : 0;
      log_prob[row] = good ? scaled(to_float(x[token]), o) - shared.log_total : static_cast<double>(NAN);
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
  DMF_LAUNCH(kernel, static_cast<unsigned>(s.rows), kWarps * 32, static_cast<size_t>(shared),
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
