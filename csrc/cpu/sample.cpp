// Sampling fuses scaling, softcap, softmax, the draw and its log-probability. It reads every logit once from memory and
// writes nothing per logit. Less is impossible, because each logit counts in the sum. The fp64 sums of the blocks are
// kept. A uniform number picks a block by these sums and then a token inside the block, whose 512 terms are formed
// again. Softmax, multinomial, log_softmax and gather read or write the row about ten times.
//
// A token of probability 0 is never drawn, because its term adds nothing to the cumulative sum, which must exceed the
// target.
#include "sample.h"

#include <cmath>
#include <vector>

#include "../random.h"
#include "scan.h"

namespace dmf {
namespace {

struct RowDraw {
  double lse;    // NaN if the row holds NaN or +inf, -inf if nothing but -inf
  double value;  // scale * cap(z[token])
  int64_t token;
};

struct BlockSum {
  double sum, reference;  // sum of e^((cap(z) - reference) scale)
};

struct BlockSums {
  BlockSum* blocks;
  float* buffer;  // gcc would take a member array to alias the other members

  DMF_INLINE float* terms(int64_t) { return buffer; }
  DMF_INLINE void nothing(int64_t first, int64_t) { blocks[first / kBlock] = {0.0, 0.0}; }
  DMF_INLINE void rise(double, double) {}
  DMF_INLINE void add(int64_t first, int64_t, const float*, double sum, double reference) {
    blocks[first / kBlock] = {sum, reference};
  }
};

template <class T, bool Cap>
DMF_INLINE void sample_row(const T* z, double uniform, const RowOptions& o, BlockSum* blocks, RowDraw& out) {
  float e[kBlock];
  BlockSums sums{blocks, e};
  const RowTotal row = scan_row<T, Cap>(z, o, sums);
  out = {row.lse(o), NAN, 0};
  if (!std::isfinite(out.lse)) return;
  const auto factor = [&](int i) { return exp((blocks[i].reference - row.reference) * o.scale); };
  const auto weight = [&](int i) { return blocks[i].sum == 0 ? 0.0 : blocks[i].sum * factor(i); };
  double target = uniform * row.sum;
  const int block = pick(static_cast<int>(n_blocks(o)), target, weight);
  const int64_t first = block * kBlock, n = block_size(first, o);
  target /= factor(block);
  block_terms<T, Cap>(z + first, n, blocks[block].reference, o, Slope(o.scale * kLog2e), e);
  target *= exact_sum(e, n) / blocks[block].sum;  // the block's sum may be a quick_sum
  out.token = first + pick(static_cast<int>(n), target, [&](int i) { return static_cast<double>(e[i]); });
  out.value = scaled<Cap>(to_float(z[out.token]), o);
}

template <class T>
DMF_INLINE void sample_any(const void* z, double uniform, const RowOptions& o, BlockSum* blocks, RowDraw& out) {
  const T* row = static_cast<const T*>(z);
  o.softcap > 0 ? sample_row<T, true>(row, uniform, o, blocks, out)
                : sample_row<T, false>(row, uniform, o, blocks, out);
}

}  // namespace

#define DMF_SAMPLE(T, NAME)                                                                                     \
  DMF_CLONES void sample_##NAME(const void* z, double u, const RowOptions& o, BlockSum* blocks, RowDraw& out) { \
    sample_any<T>(z, u, o, blocks, out);                                                                        \
  }

DMF_SAMPLE(float, f32)
DMF_SAMPLE(bf16, bf16)
DMF_SAMPLE(fp16, f16)

Status sample(const SampleRows& s, int threads, int64_t* tokens, double* log_prob) {
  static constexpr decltype(&sample_f32) kKernels[] = {sample_f32, sample_bf16, sample_f16};
  const auto kernel = kKernels[static_cast<int>(s.dtype)];
  const int64_t itemsize = row_kernels(s.dtype, s.dtype).itemsize;
  int64_t first_fault = INT64_MAX;
#pragma omp parallel num_threads(threads) reduction(min : first_fault)
  {
    std::vector<BlockSum> blocks(n_blocks(s.options));
#pragma omp for schedule(dynamic, 1)
    for (int64_t row = 0; row < s.rows; ++row) {
      const auto id = static_cast<uint64_t>(s.row_ids ? s.row_ids[row] : row);
      RowDraw draw;
      kernel(s.logits + row * s.stride_row * itemsize, s.uniforms ? s.uniforms[row] : uniform(s.seed, id, s.step),
             s.options, blocks.data(), draw);
      tokens[row] = draw.token;
      log_prob[row] = draw.value - draw.lse;
      if (!std::isfinite(draw.lse) && row < first_fault) first_fault = row;
    }
  }
  if (first_fault == INT64_MAX) return {Fault::none, -1};
  return {Fault::bad_row, first_fault};
}

}  // namespace dmf
