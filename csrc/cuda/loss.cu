// score_rows fuses scaling, softcap, log-sum-exp, the gather of the label and the entropy, sums them over sequences and
// forms ratios, weights and the loss, in one launch. It reads every logit of a scored row once and writes nothing per
// logit. Less is impossible, since each logit counts in the sum.
//
// For weights that do not depend on pi it writes the gradient too, if two rows fit shared memory, where they wait for
// their log-sum-exp. This takes 1 read and 1 write per logit. For longer rows write_rows follows, and they are read
// twice (plan.h).
//
// A gradient in place is safe if it is as wide as its logits, since a thread then writes only where it has read. A
// 16-bit gradient of fp32 logits must have memory of its own, because gradients 2i and 2i + 1 would overwrite logit i,
// which another thread may have yet to read.
//
// A block has one row. Blocks count themselves on a counter of their sequence. The last block of a sequence adds up the
// rows in a fixed order, and the last block of all sequences adds up the loss. So there is no atomic on a float, and
// the result does not depend on which block is last. Each sequence has one block besides those of its rows, so that a
// sequence without rows is finished too.
//
// score_parts scores the rows of a call that has too few of them for the card. A block has a part of a row, and the
// last block of a row joins the parts in a fixed order before it counts itself for its sequence.
#include <climits>
#include <string>

#include "loss.h"
#include "plan.h"
#include "terms.cuh"

namespace dmf::cuda {
namespace {

enum class Pass { score, kept };  // kept also writes the gradient, for which the row stays in shared memory

constexpr long long kNone = LLONG_MAX;

// The parts of a row's gradient, which is weight times that of -log pi of the label, plus bonus times that of -H.
struct RowGradient {
  double weight, bonus;
  double lse, entropy, at_label;
  __device__ bool is_zero() const { return weight == 0.0 && bonus == 0.0; }
};

// The gradient in the form that the threads of a block need. One of them makes it.
struct Slope {
  float reference;
  float factor, linear;  // dz is 2^exponent * (factor + linear * distance), where a power of 2 is taken out of both
  float biased;          // adds that power to the exponent
  float at_label;
};

struct Shared {
  Lanes<float> top;
  Lanes<Sums> sums, sequence;
  Lanes<long long> fault, first;
  Lanes<double> total;
  RowGradient gradient;
  Slope slope;
  bool last;
};
static_assert(sizeof(Shared) <= kStaticShared, "plan.h leaves it that much");

__device__ long long encode(int64_t place, Fault fault) { return place * 8 + static_cast<int64_t>(fault); }

// Returns whether the inputs may be given to an objective: none is NaN, and an infinity has a meaning where it stands.
__device__ bool inputs_ok(const Terms& t, const Sequence& x) {
  const bool base = isfinite(x.log_base) || (x.log_base == -INFINITY && t.objective.max_weight < INFINITY);
  return (!t.has(kLogProposal) || isfinite(x.log_proposal)) && x.log_target < INFINITY && x.log_z < INFINITY &&
         isfinite(x.reward) && isfinite(x.baseline) && base;
}

// Returns a known weight, or 0 if it can't be used.
__device__ Weight known_weight(const Terms& t, int64_t i) {
  const Sequence x = sequence(t, i, t.at(kLogProposal, i));
  Weight w = weigh(t.objective, x);
  if (w.out_of_range || !inputs_ok(t, x)) w.weight = 0.0;
  return w;
}

__device__ void finish_sequence(const Batch& b, const Terms& t, const Outputs& out, long long* faults, int64_t i,
                                bool known, Shared& shared) {
  const int64_t first = b.first_row(i), last = b.first_row(i + 1);
  Sums sums{0, 0, 0};
  long long fault = kNone;
  for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) {
    const int64_t label = b.labels[row];
    if (label == kIgnore) continue;
    const double lse = out.lse(row), log_prob = out.label(row) - lse;
    sums.a += log_prob;
    if (out.entropy) sums.b += out.row_entropy(row);
    Fault found = Fault::none;
    if (!b.is_token(label))
      found = Fault::unusual;
    else if (isnan(lse) || lse == INFINITY)
      found = Fault::bad_row;
    else if (b.column(label) != kElsewhere && !(log_prob > -INFINITY))
      found = Fault::label;
    if (found != Fault::none) fault = min(fault, encode(row, found));
  }
  sums = block_sum(sums, shared.sequence);
  fault = block_min(fault, shared.fault);
  const bool bad_rows = fault != kNone;
  if (bad_rows)  // NaN makes backward write 0, whatever weight it is given
    for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) out.lse(row) = NAN;
  if (threadIdx.x != 0) return;
  const double log_prob = bad_rows ? static_cast<double>(NAN) : sums.a;
  out.log_prob(i) = log_prob;
  out.sequence_entropy(i) = bad_rows ? static_cast<double>(NAN) : sums.b;  // 0 if the entropy is not wanted
  if (t.objective.kind != Kind::none) {
    const Sequence x = sequence(t, i, log_prob);
    Weight w = weigh(t.objective, x);
    out.log_ratio(i) = w.log_ratio;
    out.log_target_ratio(i) = w.log_target_ratio;
    if (known) w = weigh(t.objective, sequence(t, i, t.at(kLogProposal, i)));
    out.clipped(i) = w.clipped;
    if (!bad_rows) {
      // a fault of a row takes precedence over one of a weight, as on the CPU
      if (!inputs_ok(t, x))
        fault = encode(kWeightPlace + i, Fault::input);
      else if (w.out_of_range)
        fault = encode(kWeightPlace + i, Fault::weight);
    }
    const double weight = fault == kNone ? w.weight : 0.0;
    out.weight(i) = weight;
    out.loss(i) = bad_rows ? 0.0 : loss_of(weight, log_prob, t.entropy_coefficient, sums.b);
  }
  faults[i] = fault;
}

__device__ void finish_loss(const Batch& b, const Terms& t, const Outputs& out, const long long* faults,
                            int64_t* status, Shared& shared) {
  const bool has_loss = t.objective.kind != Kind::none;
  long long fault = kNone;
  double total = 0;
  for (int64_t i = threadIdx.x; i < b.sequences; i += blockDim.x) {
    fault = min(fault, faults[i]);
    if (has_loss) total += out.loss(i);
  }
  fault = block_min(fault, shared.first);
  if (threadIdx.x == 0) *status = fault == kNone ? -1 : fault;
  if (!has_loss) return;
  total = block_sum(total, shared.total);
  if (threadIdx.x == 0) *out.total = total / out.divide_by;
}

// dz[v] = scale * cap'(z[v]) * (weight * (p[v] - (v == label)) + bonus * p[v] * (log p[v] + H)), with the softmax p
template <bool Cap>
__device__ Slope slope_of(const Constants& c, const RowOptions& o, const RowGradient& row) {
  double z = row.lse / o.scale;  // a logit of this value has the term 1
  if (Cap) {
    const double u = z / o.softcap;
    z = u > 0.999 ? c.bound : o.softcap * atanh(fmax(u, -0.999));  // no logit has a larger term than lse
  }
  const float reference = static_cast<float>(z);
  const double off = scaled(reference, o) - row.lse, mend = exp(off);  // corrects the rounding of the reference
  const double slope = row.bonus * o.scale * mend, full = row.weight * o.scale * mend + slope * (off + row.entropy);
  const double size = fmax(fabs(full), fabs(slope));
  int64_t raw;
  memcpy(&raw, &size, 8);
  // the 32 makes terms vanish only where the result is below fp32's denormals
  const int power = min(max(static_cast<int>(raw >> 52 & 0x7ff) - 1023 + 32, -120), 120);
  double shrink;  // 2^-power
  raw = static_cast<int64_t>(1023 - power) << 52;
  memcpy(&shrink, &raw, 8);
  const double nats = Cap ? 2.0 * o.scale * o.softcap : o.scale;  // of a distance
  return {reference, static_cast<float>(full * shrink), static_cast<float>(slope * nats * shrink),
          kBiased + static_cast<float>(power), static_cast<float>(row.at_label)};
}

// Writes dz of the row. The label's column gets at_label; a label of another shard has a column outside the row. With a
// bonus the factor is linear in log p. Kept says that the logits come from shared memory, where a late load costs
// little.
template <class In, class Out, bool Cap, bool WithBonus, bool Kept = false>
struct Write {
  const Constants& c;
  Reference<Cap> reference;
  Slope slope;
  int label;
  Out* dz;

  __device__ Write(const Constants& c, const Slope& slope, int label, Out* dz)
      : c(c), reference(c), slope(slope), label(label), dz(dz) {
    reference.set(c, slope.reference);
  }

  // Below least, p is 0, and so is p log p.
  __device__ float of_p(float distance) const {
    return WithBonus ? fmaf(slope.linear, fmaxf(distance, c.least), slope.factor) : slope.factor;
  }

  // reference and most are those of the row, for one round.
  __device__ float gradient(const Reference<Cap>& reference, float most, float z) const {
    if constexpr (Cap) {
      z = fminf(z, most);  // keeps full finite; 1 - tanh^2 is only 2e-24 there
      const float full = reference.full(c, z), part = reciprocal_approx(full + 1.0f);
      const float d = reference.distance(c, z, full);
      // cap' = 1 - tanh^2, which is 0 at -inf
      return term_of(d, c.bits, slope.biased).value() * of_p(d) * (4.0f * part * (full * part));
    } else {
      const float d = reference.distance(c, z);
      return term_of(d, c.bits, slope.biased).value() * of_p(d);
    }
  }

  template <int N, int K>
  __device__ void operator()(int first, const Pack<In, N> (&packs)[K]) const {
    Reference<Cap> near = reference;
    float most = 2.0f * c.bound;
    if (N > 1 && !Kept) (Cap ? most : near.z) = after(Cap ? most : near.z, packs, c);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = gradient(near, most, at(packs[k], j));
      store_last(dz + first + k * kApart * N, rounded<Out>(out));
      if constexpr (kEachPack) label_in<N>(first + k * kApart * N, 0);
    }
    if constexpr (!kEachPack) label_in<N>(first, K > 1 ? kApart * N : 0);
  }

  // An fp32 gradient with a bonus leaves no register on sm_120 for one test of both packs.
  static constexpr bool kEachPack = WithBonus && !Cap && sizeof(Out) == 4;

  // Writes the label's column if it is one of the N that begin at first, or of those that begin at first + apart, which
  // is a power of 2.
  template <int N>
  __device__ void label_in(int first, unsigned apart) const {
    if ((static_cast<unsigned>(label - first) & ~apart) < N) from_float(slope.at_label, dz[label]);
  }
};

// Returns the gradient of the label's column, formed in one subtraction so that nothing cancels where p is near 1. It
// must be called before dz, which may be z, is written.
__device__ double label_gradient(float z, const RowGradient& row, const RowOptions& o) {
  const double t = o.softcap > 0 ? tanh(z / o.softcap) : 0.0, slope = 1.0 - t * t, log_p = scaled(z, o) - row.lse;
  double g = row.weight * o.scale * slope * expm1(log_p);
  if (row.bonus != 0.0 && log_p > -INFINITY) g += row.bonus * o.scale * slope * exp(log_p) * (log_p + row.entropy);
  return g;
}

template <class T>
__device__ T* row_of(const Gradient& g, const Batch& b, int64_t row) {
  return reinterpret_cast<T*>(g.data) + g.offset(b, row);
}

// The sum of a row or of a part of it, relative to its largest logit.
struct RowSum {
  float top;
  Sums sums;  // of the terms that are 1, of the others, and of terms * distances
  __device__ double total() const { return sums.a + sums.b; }
  __device__ double lse(const RowOptions& o) const { return scaled(top, o) + log(total()); }
  // It is 0 if all logits are -inf, where the total is 0.
  template <bool Cap>
  __device__ double entropy(const RowOptions& o) const {
    const double nats = Cap ? 2.0 * o.scale * o.softcap : o.scale;  // of a distance
    return total() == 0.0 ? 0.0 : log(total()) - nats * sums.c / total();
  }
};

// Calls each for the packs of z, before they are added up.
template <class In, bool Cap, bool Entropy, class Each>
__device__ RowSum sum_row(const Constants& c, const Cut& cut, const In* z, Shared& shared, Each each) {
  WarpSum<Cap, Entropy> sum(c);
  for_warp<In>(cut, FromRow<In>{z}, [&](bool there, int i, const auto& packs) {
    each(there, i, packs);
    sum.add(c, there, packs);
  });
  const float top = block_max(sum.reference.z, shared.top);
  if (top > sum.reference.z) sum.rise(c, top);
  return {top, block_sum({static_cast<double>(sum.ones), sum.rest, sum.moment}, shared.sums)};
}

template <class In, class Out, bool Cap, bool Entropy, Pass P>
__device__ void score_row(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                          const Constants& c, int64_t row, Shared& shared) {
  constexpr bool kKnown = P == Pass::kept;
  DMF_DYNAMIC_SHARED(memory);
  const RowOptions& o = b.options;
  const int64_t label = b.labels[row];
  const int column = static_cast<int>(label - b.vocab_start), vocab = static_cast<int>(o.vocab);
  const In* z = reinterpret_cast<const In*>(b.logits) + b.offset(row);
  Out* dz = kKnown ? row_of<Out>(g, b, row) : nullptr;
  if (!b.is_token(label)) {
    if (threadIdx.x == 0) {
      out.lse(row) = label == kIgnore ? 0.0 : static_cast<double>(NAN);
      out.label(row) = 0.0;
      if (Entropy) out.row_entropy(row) = 0.0;
    }
    if (kKnown) zero_row(dz, vocab);
    return;
  }
  const Cut cut = cut_row(z, vocab);
  // keeps the row's packs aligned in shared memory too
  In* kept = reinterpret_cast<In*>(memory) + (kWidth<In> - cut.head % kWidth<In>) % kWidth<In>;
  // this must be read before dz, which may be z, is written
  const bool here = static_cast<unsigned>(column) < static_cast<unsigned>(vocab);
  const float at_label = threadIdx.x == 0 && here ? to_float(z[column]) : 0.0f;

  const RowSum sum = sum_row<In, Cap, Entropy>(c, cut, z, shared, [&](bool there, int i, const auto& packs) {
    if (P == Pass::kept && there) store(kept + i, packs);
  });
  if (threadIdx.x == 0) {
    const double lse = sum.lse(o), entropy = sum.entropy<Cap>(o);
    out.lse(row) = lse;
    out.label(row) = scaled(at_label, o);
    if (Entropy) out.row_entropy(row) = entropy;
    if (kKnown) {
      RowGradient& of_row = shared.gradient;
      const bool good = isfinite(lse);
      of_row = {good ? known_weight(t, b.sequence_of(row)).weight * b.share(row) * factor : 0.0,
                Entropy && good ? t.entropy_coefficient * factor : 0.0, lse, entropy, 0.0};
      if (!of_row.is_zero()) {
        of_row.at_label = label_gradient(at_label, of_row, o);
        shared.slope = slope_of<Cap>(c, o, of_row);
      }
    }
  }
  if (!kKnown) return;
  __syncthreads();
  if (shared.gradient.is_zero()) {
    zero_row(dz, vocab);
    return;
  }
  const Cut both = cut_rows(z, dz, vocab);
  if (Entropy && shared.gradient.bonus != 0.0)
    for_row<Out>(both, FromRow<In>{kept}, Write<In, Out, Cap, true, true>(c, shared.slope, column, dz));
  else
    for_row<Out>(both, FromRow<In>{kept}, Write<In, Out, Cap, false, true>(c, shared.slope, column, dz));
}

// The score reaches 4 blocks anyway, and 2 kept rows fit. Without these bounds the compiler spills to reach more.
template <class In, class Out, bool Cap, bool Entropy, Pass P>
__global__ void __launch_bounds__(P == Pass::score ? kMaxThreads : kMaxKnownThreads, P == Pass::score ? 4 : 2)
    score_rows(Batch b, Terms t, Outputs out, double factor, Gradient g, Workspace w, Constants c) {
  DMF_SHARED(Shared, shared);
  constexpr bool kKnown = P == Pass::kept;
  long long* const faults = reinterpret_cast<long long*>(w.faults);
  const int64_t block = blockIdx.x, row = block - b.sequences - 1;
  if (block != b.sequences) {  // this block belongs to the loss, so that a batch without sequences has one too
    if (row >= 0) score_row<In, Out, Cap, Entropy, P>(b, t, out, factor, g, c, row, shared);
    const int64_t i = block < b.sequences ? block : b.sequence_of(row);
    if (!is_last(w.counters + i, b.first_row(i + 1) - b.first_row(i) + 1, shared.last)) return;
    finish_sequence(b, t, out, faults, i, kKnown, shared);
    if (kKnown) {
      __syncthreads();
      if (isnan(out.log_prob(i)))  // a row has a fault here, and a fault of the weight has made the weight 0 already
        for (int64_t r = b.first_row(i); r < b.first_row(i + 1); ++r)
          zero_row(row_of<Out>(g, b, r), static_cast<int>(b.options.vocab));
    }
  }
  if (is_last(w.counters + b.sequences, b.sequences + 1, shared.last)) finish_loss(b, t, out, faults, w.status, shared);
}

// --- rows in parts -------------------------------------------------------------------------------------------------

// The log-sum-exp and the entropy of a part of a row.
struct Part {
  double lse, entropy;
};

// The parts of all rows, (rows, kMostParts).
__device__ Part* parts_of(const Batch& b, const Workspace& w, int64_t row) {
  return reinterpret_cast<Part*>(w.faults + b.sequences) + row * kMostParts;
}

template <class T, bool Cap, bool Entropy>
__device__ void score_part(const Batch& b, const Outputs& out, const Constants& c, int64_t row, int part, int parts,
                           Part& result, Shared& shared) {
  const RowOptions& o = b.options;
  const int64_t label = b.labels[row];
  if (!b.is_token(label)) return;
  const int column = static_cast<int>(label - b.vocab_start), vocab = static_cast<int>(o.vocab);
  const T* z = reinterpret_cast<const T*>(b.logits) + b.offset(row);
  if (part == 0 && threadIdx.x == 0) {
    const bool here = static_cast<unsigned>(column) < static_cast<unsigned>(vocab);
    out.label(row) = scaled(here ? to_float(z[column]) : 0.0f, o);
  }
  const int first = first_of_part(z, vocab, part, parts), last = first_of_part(z, vocab, part + 1, parts);
  const Cut cut = cut_row(z + first, last - first);
  const RowSum sum = sum_row<T, Cap, Entropy>(c, cut, z + first, shared, [](bool, int, const auto&) {});
  if (threadIdx.x == 0) result = {sum.lse(o), Entropy ? sum.entropy<Cap>(o) : 0.0};
}

// Forms lse = log sum_s e^(lse_s) and H = lse - sum_s w_s (lse_s - H_s) with w_s = e^(lse_s - lse), as shards.py does
// for ranks. NaN reaches the result.
template <bool Entropy>
__device__ void join_parts(const Batch& b, const Outputs& out, int64_t row, int parts, const Part* of_row) {
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  const int64_t label = b.labels[row];
  const bool token = b.is_token(label);
  const Part mine = token && lane < parts ? of_row[lane] : Part{-INFINITY, 0.0};
  double top = mine.lse;
  for (int mask = 16; mask > 0; mask /= 2) top = fmax(top, shuffle(top, mask));
  const double share = mine.lse == -INFINITY ? 0.0 : exp(mine.lse - top);
  Sums sums{share, Entropy && share != 0.0 ? share * (mine.lse - mine.entropy) : 0.0, 0.0};
  for (int mask = 16; mask > 0; mask /= 2) {
    sums.a += shuffle(sums.a, mask);
    if (Entropy) sums.b += shuffle(sums.b, mask);
  }
  if (lane != 0) return;
  if (token) {
    const double lse = top + log(sums.a);
    out.lse(row) = lse;
    if (Entropy) out.row_entropy(row) = sums.a == 0.0 ? 0.0 : lse - sums.b / sums.a;
  } else {
    out.lse(row) = label == kIgnore ? 0.0 : static_cast<double>(NAN);
    out.label(row) = 0.0;
    if (Entropy) out.row_entropy(row) = 0.0;
  }
}

template <class T, bool Cap, bool Entropy>
__global__ void __launch_bounds__(kMaxThreads, 4)
    score_parts(Batch b, Terms t, Outputs out, int parts, Workspace w, Constants c) {
  DMF_SHARED(Shared, shared);
  long long* const faults = reinterpret_cast<long long*>(w.faults);
  const int64_t block = blockIdx.x, first = b.sequences + 1;
  if (block != b.sequences) {  // this block belongs to the loss, as in score_rows
    int64_t i = block;
    if (block >= first) {
      const int64_t row = (block - first) / parts;
      const int part = static_cast<int>((block - first) % parts);
      score_part<T, Cap, Entropy>(b, out, c, row, part, parts, parts_of(b, w, row)[part], shared);
      if (!is_last(w.counters + first + row, parts, shared.last)) return;
      join_parts<Entropy>(b, out, row, parts, parts_of(b, w, row));
      i = b.sequence_of(row);
    }
    if (!is_last(w.counters + i, b.first_row(i + 1) - b.first_row(i) + 1, shared.last)) return;
    finish_sequence(b, t, out, faults, i, false, shared);
  }
  if (is_last(w.counters + b.sequences, b.sequences + 1, shared.last)) finish_loss(b, t, out, faults, w.status, shared);
}

// --- gradients -----------------------------------------------------------------------------------------------------

// The number of blocks without a softcap, 5 or 6, avoids spills that ptxas makes on one of the architectures.
template <class In, class Out, bool Cap, bool WithBonus>
__global__ void __launch_bounds__(kMaxThreads, Cap                                                            ? 0
                                               : sizeof(In) != sizeof(Out) || (sizeof(In) == 2 && !WithBonus) ? 5
                                                                                                              : 6)
    write_rows(Batch b, const double* lse, const double* weight, Bonus bonus, double factor, const double* upstream,
               double unless, Gradient g, Constants c) {
  struct OneRow {
    RowGradient gradient;
    Slope slope;
  };
  DMF_SHARED(OneRow, shared);
  if (upstream && *upstream == unless) return;
  const RowOptions& o = b.options;
  const int64_t row = blockIdx.x, label = b.labels[row];
  // a label of another shard has a column outside the row, which no pack contains
  const int column = static_cast<int>(label - b.vocab_start), vocab = static_cast<int>(o.vocab);
  const In* z = reinterpret_cast<const In*>(b.logits) + b.offset(row);
  Out* dz = row_of<Out>(g, b, row);
  if (threadIdx.x == 0) {
    const bool scored = b.is_token(label) && isfinite(lse[row]);
    const bool here = static_cast<unsigned>(column) < static_cast<unsigned>(vocab);
    const int64_t sequence = b.sequence_of(row);
    const double by = factor * (upstream ? *upstream : 1.0);
    RowGradient& of_row = shared.gradient;
    of_row = {scored ? weight[sequence] * b.share(row) * by : 0.0, 0.0, lse[row], 0.0, 0.0};
    if (WithBonus && scored) {
      of_row.bonus = (bonus.weight ? bonus.weight[sequence] : bonus.constant) * by;
      of_row.entropy = bonus.entropy[row];
    }
    if (!of_row.is_zero()) {
      if (here) of_row.at_label = label_gradient(to_float(z[column]), of_row, o);
      shared.slope = slope_of<Cap>(c, o, of_row);
    }
  }
  __syncthreads();
  if (shared.gradient.is_zero()) {
    zero_row(dz, vocab);
    return;
  }
  const Write<In, Out, Cap, WithBonus> write(c, shared.slope, column, dz);
  for_row<Out>(cut_rows(z, dz, vocab), FromRow<In>{z}, write);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) scale_rows(Batch b, double factor, const double* upstream, Gradient g) {
  const float by = static_cast<float>(factor * *upstream);
  const int64_t row = blockIdx.x;
  if (by == 1.0f || (b.labels && b.labels[row] < 0)) return;
  T* dz = row_of<T>(g, b, row);
  if (by == 0.0f) {  // even a gradient that overflowed becomes 0
    zero_row(dz, static_cast<int>(b.options.vocab));
    return;
  }
  for_row<T>(cut_row(dz, static_cast<int>(b.options.vocab)), FromRow<T>{dz}, [&](int i, const auto& packs) {
    for (auto pack : packs) {
      for (auto& x : pack.x) from_float(to_float(x) * by, x);
      store(dz + i, pack);
      i += kApart * kWidth<T>;
    }
  });
}

// --- launching -----------------------------------------------------------------------------------------------------

// Calls body with a value of a dtype's type.
template <class Body>
void with_type(DType dtype, Body body) {
  if (dtype == DType::f32)
    body(float{});
  else if (dtype == DType::bf16)
    body(bf16{});
  else
    body(f16{});
}

// Calls body with a value of the type of the logits and one of the type of their gradient.
template <class Body>
void with_types(DType logits, DType gradient, Body body) {
  if (logits == gradient)
    with_type(logits, [&](auto type) { body(type, type); });
  else if (logits != DType::f32)
    throw std::runtime_error("the gradient of 16-bit logits has their dtype");
  else if (gradient == DType::bf16)
    body(float{}, bf16{});
  else
    body(float{}, f16{});
}

unsigned grid(const Batch& b, int64_t blocks) {
  if (blocks > INT_MAX || b.options.vocab > INT_MAX - 64) throw std::runtime_error("too many rows, or too long ones");
  return static_cast<unsigned>(blocks);
}

template <class In, class Out, bool Cap, bool Entropy, Pass P>
void launch_score(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                  const Workspace& w, const Plan& plan) {
  const auto kernel = score_rows<In, Out, Cap, Entropy, P>;
  if (plan.shared > 0) allow_shared(kernel, shared_for_row(shared_limit(w.device)));
  DMF_LAUNCH(kernel, grid(b, b.rows + b.sequences + 1), plan.threads, static_cast<size_t>(plan.shared),
             static_cast<cudaStream_t>(w.stream), b, t, out, factor, g, w, constants_of(b.options));
  check(cudaGetLastError());
}

template <class T, bool Cap, bool Entropy>
void launch_scoring(const Batch& b, const Terms& t, const Outputs& out, const Workspace& w) {
  const int64_t vocab = b.options.vocab;
  const int parts = b.rows <= kFewRows ? parts_of_row(b.rows, vocab, sizeof(T), multiprocessors(w.device)) : 1;
  if (parts == 1) {
    launch_score<T, T, Cap, Entropy, Pass::score>(b, t, out, 0.0, Gradient{}, w, plan_once(vocab, sizeof(T)));
    return;
  }
  const auto kernel = score_parts<T, Cap, Entropy>;
  DMF_LAUNCH(kernel, grid(b, b.rows * parts + b.sequences + 1), plan_once(vocab / parts, sizeof(T)).threads, 0,
             static_cast<cudaStream_t>(w.stream), b, t, out, parts, w, constants_of(b.options));
  check(cudaGetLastError());
}

template <class In, class Out, bool Cap, bool Entropy>
void launch_known(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                  const Workspace& w) {
  const Plan plan = plan_known(b.options.vocab, sizeof(In), shared_limit(w.device));
  launch_score<In, Out, Cap, Entropy, Pass::kept>(b, t, out, factor, g, w, plan);
}

}  // namespace

void forward(const Batch& b, const Terms& t, const Outputs& out, const Workspace& w) {
  const OnDevice guard(w.device);
  with_type(b.dtype, [&](auto type) {
    using T = decltype(type);
    const bool cap = b.options.softcap > 0;
    const auto launch = cap ? (out.entropy ? launch_scoring<T, true, true> : launch_scoring<T, true, false>)
                            : (out.entropy ? launch_scoring<T, false, true> : launch_scoring<T, false, false>);
    launch(b, t, out, w);
  });
}

void forward_backward(const Batch& b, const Terms& t, const Outputs& out, double factor, const Gradient& g,
                      const Workspace& w) {
  const OnDevice guard(w.device);
  const int64_t itemsize = b.dtype == DType::f32 ? 4 : 2;
  if (!plan_known(b.options.vocab, itemsize, shared_limit(w.device)).kept) {
    forward(b, t, out, w);
    const bool has_bonus = out.entropy && t.entropy_coefficient != 0.0;
    const Bonus bonus{has_bonus ? &out.row_entropy(0) : nullptr, nullptr, t.entropy_coefficient};
    backward(b, &out.lse(0), &out.weight(0), bonus, factor, nullptr, NAN, g, w);
    return;
  }
  with_types(b.dtype, g.dtype, [&](auto in, auto of_gradient) {
    using In = decltype(in);
    using Out = decltype(of_gradient);
    const bool cap = b.options.softcap > 0;
    const auto launch = cap ? (out.entropy ? launch_known<In, Out, true, true> : launch_known<In, Out, true, false>)
                            : (out.entropy ? launch_known<In, Out, false, true> : launch_known<In, Out, false, false>);
    launch(b, t, out, factor, g, w);
  });
}

void backward(const Batch& b, const double* lse, const double* weight, const Bonus& bonus, double factor,
              const double* upstream, double unless, const Gradient& g, const Workspace& w) {
  if (b.rows == 0) return;
  const OnDevice guard(w.device);
  with_types(b.dtype, g.dtype, [&](auto in, auto of_gradient) {
    using In = decltype(in);
    using Out = decltype(of_gradient);
    const bool cap = b.options.softcap > 0;
    const auto kernel = bonus.entropy ? (cap ? write_rows<In, Out, true, true> : write_rows<In, Out, false, true>)
                                      : (cap ? write_rows<In, Out, true, false> : write_rows<In, Out, false, false>);
    DMF_LAUNCH(kernel, grid(b, b.rows), plan_once(b.options.vocab, sizeof(In)).threads, 0,
               static_cast<cudaStream_t>(w.stream), b, lse, weight, bonus, factor, upstream, unless, g,
               constants_of(b.options));
  });
  check(cudaGetLastError());
}

void scale(const Batch& b, double factor, const double* upstream, const Gradient& g, const Workspace& w) {
  if (b.rows == 0) return;
  const OnDevice guard(w.device);
  with_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = scale_rows<T>;
    DMF_LAUNCH(kernel, grid(b, b.rows), plan_once(b.options.vocab, sizeof(T)).threads, 0,
               static_cast<cudaStream_t>(w.stream), b, factor, upstream, g);
  });
  check(cudaGetLastError());
}

namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

}  // namespace

std::string why_not(int device) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found != cudaSuccess) {
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (found == cudaErrorNoDevice) return "compiled, no device";
    if (found != cudaErrorInsufficientDriver)
      return std::string("compiled, but CUDA says: ") + cudaGetErrorString(found);
    if (driver == 0) return "compiled, no device: there is no NVIDIA driver";
    return "compiled for CUDA " + version(runtime) + ", but the NVIDIA driver is for CUDA " + version(driver) +
           " at most; update the driver, or reinstall with an older nvcc";
  }
  if (device < 0) return "";
  if (device >= count) return "compiled, no device " + std::to_string(device);
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, scale_rows<float>);
  if (loaded == cudaSuccess) return "";
  cudaGetLastError();
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const std::string arch = std::to_string(major) + std::to_string(minor);
  return "compiled, but nothing that device " + std::to_string(device) + " (sm_" + arch +
         ") can run: " + cudaGetErrorString(loaded) + "; reinstall with DMFAST_CUDA_ARCHS=" + arch;
}

}  // namespace dmf::cuda
