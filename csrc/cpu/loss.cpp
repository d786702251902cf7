#include "loss.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <memory>

namespace dmf {
namespace {

// A row that can't be scored is encoded as row * 4 + fault, so that the minimum is the first one on any thread.
constexpr int64_t kNoFault = INT64_MAX;
Status status(int64_t fault) {
  if (fault == kNoFault) return {Fault::none, -1};
  return {static_cast<Fault>(fault & 3), fault >> 2};
}

// Stores a row's results, which are 0 for a row that is not scored, and returns the fault of a scored one.
int64_t keep_row(const Outputs& out, int64_t row, const RowSum& sum, bool here) {
  out.lse(row) = sum.lse;
  out.label(row) = sum.label;
  if (out.entropy) out.row_entropy(row) = sum.entropy;
  if (std::isnan(sum.lse) || sum.lse == INFINITY) return row * 4 + static_cast<int64_t>(Fault::bad_row);
  if (here && !(sum.label - sum.lse > -INFINITY)) return row * 4 + static_cast<int64_t>(Fault::label);
  return kNoFault;
}

int64_t score_row(const Batch& b, const RowKernels& k, const Outputs& out, int64_t row) {
  const int64_t label = b.labels[row], column = b.column(label);
  RowSum sum{0, 0, 0};
  if (label >= 0) k.forward(b.logits + b.offset(row) * k.itemsize, column, b.options, out.entropy, sum);
  return keep_row(out, row, sum, column >= 0);
}

void write_row(const Batch& b, const RowKernels& k, int64_t row, double lse, const RowWeight& weight,
               const Gradient& g) {
  char* dz = g.data + g.offset(b, row) * k.gradient_itemsize;
  const int64_t label = b.labels[row];
  if (label < 0 || weight.is_zero())
    std::memset(dz, 0, static_cast<size_t>(b.options.vocab * k.gradient_itemsize));
  else
    k.backward(b.logits + b.offset(row) * k.itemsize, dz, b.column(label), weight, lse, b.options);
}

// Sums rows into sequences in row order, whichever thread scored them.
void sum_rows(const Batch& b, const Outputs& out) {
  for (int64_t i = 0; i < b.sequences; ++i) {
    double log_prob = 0, entropy = 0;
    for (int64_t row = b.first_row(i); row < b.first_row(i + 1); ++row) {
      log_prob += out.label(row) - out.lse(row);
      if (out.entropy) entropy += out.row_entropy(row);
    }
    out.log_prob(i) = log_prob;
    out.sequence_entropy(i) = entropy;  // 0 where the entropy is not computed
  }
}

// Forms the ratios, the losses and their sum, and the weights unless these are known.
Status form_weights(const Batch& b, const Terms& t, const Outputs& out, bool known) {
  Status result{Fault::none, -1};
  if (t.objective.kind == Kind::none) return result;
  *out.total = 0;
  for (int64_t i = 0; i < b.sequences; ++i) {
    const Weight w = weigh(t.objective, sequence(t, i, out.log_prob(i)));
    out.log_ratio(i) = w.log_ratio;
    out.log_target_ratio(i) = w.log_target_ratio;
    if (!known) {
      out.weight(i) = w.weight;
      out.clipped(i) = w.clipped;
      if (w.out_of_range && result.fault == Fault::none) result = {Fault::weight, i};
    }
    out.loss(i) = loss_of(out.weight(i), out.log_prob(i), t.entropy_coefficient, out.sequence_entropy(i));
    *out.total += out.loss(i);
  }
  *out.total /= out.divide_by;
  return result;
}

// Runs body(row, its sequence) over all rows on threads and returns the first fault.
template <class Body>
int64_t for_rows(const Batch& b, Body body) {
  int64_t first = kNoFault;
#pragma omp parallel for schedule(dynamic, 4) num_threads(b.threads) reduction(min : first)
  for (int64_t row = 0; row < b.rows; ++row) {
    const int64_t fault = body(row, b.sequence_of(row));
    first = fault < first ? fault : first;
  }
  return first;
}

}  // namespace

bool is_plain(const Batch& b, const Terms& t) {
  bool plain = true;
  if (b.cu_seqlens) {
    plain = b.cu_seqlens[0] == 0 && b.cu_seqlens[b.sequences] == b.rows;
    for (int64_t i = 0; i < b.sequences; ++i) plain &= b.cu_seqlens[i] <= b.cu_seqlens[i + 1];
  }
  for (int64_t row = 0; row < b.rows; ++row) plain &= b.is_token(b.labels[row]) || b.labels[row] == kIgnore;
  if (b.token_weight)
    for (int64_t row = 0; row < b.rows; ++row) plain &= std::fabs(b.token_weight[row]) <= kMaxTokenWeight;
  const bool none_at_zero = t.objective.is(kInfiniteAtZero);
  for (int c = 0; c < kColumns; ++c) {
    const auto column = static_cast<Column>(c);
    const int64_t n = t.has(column) ? b.sequences : (b.sequences > 0 ? 1 : 0);
    for (int64_t i = 0; i < n; ++i) {
      const double value = t.at(column, i);
      const bool may_be_minus_infinity = c == kLogZ || (c == kLogTarget && !none_at_zero);
      plain &= may_be_minus_infinity ? value < INFINITY : std::isfinite(value);
    }
  }
  return plain;
}

Status forward(const Batch& b, const Terms& t, const Outputs& out, bool checked) {
  if (!checked && !is_plain(b, t)) return {Fault::unusual, -1};
  const RowKernels k = row_kernels(b.dtype, b.dtype);
  const int64_t fault = for_rows(b, [&](int64_t row, int64_t) { return score_row(b, k, out, row); });
  if (fault != kNoFault) return status(fault);
  sum_rows(b, out);
  return form_weights(b, t, out, false);
}

void backward(const Batch& b, const double* lse, const double* weight, const Bonus& bonus, double factor,
              const double* upstream, const Gradient& g) {
  const RowKernels k = row_kernels(b.dtype, g.dtype);
  if (upstream) factor *= *upstream;
  for_rows(b, [&](int64_t row, int64_t sequence) {
    RowWeight of_row{weight[sequence] * b.share(row) * factor, 0.0, 0.0};
    if (bonus.weight) of_row = {of_row.weight, bonus.weight[sequence] * factor, bonus.entropy[row]};
    write_row(b, k, row, lse[row], of_row, g);
    return kNoFault;
  });
}

Status forward_backward(const Batch& b, const Terms& t, const Outputs& out, bool checked, double factor,
                        const Gradient& g) {
  if (!checked && !is_plain(b, t)) return {Fault::unusual, -1};
  const RowKernels k = row_kernels(b.dtype, g.dtype);
  for (int64_t i = 0; i < b.sequences; ++i) {
    out.log_prob(i) = t.at(kLogProposal, i);
    out.sequence_entropy(i) = 0.0;
  }
  const Status weights = form_weights(b, t, out, false);
  if (weights.fault != Fault::none) return weights;
  const int64_t size = scratch_size(b.options);
  const std::unique_ptr<double[]> scratch(new double[size * b.threads]);  // a thread uses only its own part
  const int64_t fault = for_rows(b, [&](int64_t row, int64_t sequence) {
    const RowWeight weight{out.weight(sequence) * b.share(row) * factor, t.entropy_coefficient * factor, 0.0};
    const int64_t label = b.labels[row];
    if (label < 0 || weight.is_zero()) {
      const int64_t f = score_row(b, k, out, row);
      if (f == kNoFault) write_row(b, k, row, 0.0, RowWeight{0.0, 0.0, 0.0}, g);
      return f;
    }
    RowSum sum;
    k.both(b.logits + b.offset(row) * k.itemsize, g.data + g.offset(b, row) * k.gradient_itemsize, label, weight,
           b.options, out.entropy, scratch.get() + size * omp_get_thread_num(), sum);
    return keep_row(out, row, sum, true);
  });
  if (fault != kNoFault) return status(fault);
  sum_rows(b, out);
  return form_weights(b, t, out, true);
}

void scale(const Batch& b, double factor, const double* upstream, const Gradient& g) {
  const auto by = static_cast<float>(factor * *upstream);
  if (by == 1.0f) return;
  const RowKernels k = row_kernels(g.dtype, g.dtype);
#pragma omp parallel for schedule(static) num_threads(b.threads)
  for (int64_t row = 0; row < b.rows; ++row) {
    if (b.labels && b.labels[row] < 0) continue;
    char* dz = g.data + g.offset(b, row) * k.gradient_itemsize;
    if (by == 0.0f)
      std::memset(dz, 0, static_cast<size_t>(b.options.vocab * k.gradient_itemsize));
    else
      k.scale(dz, b.options.vocab, by);
  }
}

}  // namespace dmf
