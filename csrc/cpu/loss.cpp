#include "loss.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace dmf {
namespace {

// Rows that can't be scored, as one number so that the first of them wins whatever the thread: row * 4 + fault.
constexpr int64_t kNoFault = INT64_MAX;
Status status(int64_t fault) {
  if (fault == kNoFault) return {Fault::none, -1};
  return {static_cast<Fault>(fault & 3), fault >> 2};
}

// What rows contribute to their sequences.
struct RowValues {
  std::vector<double> log_prob, entropy;
  RowValues(const Batch& b, const Outputs& out) : log_prob(b.rows), entropy(out.entropy ? b.rows : 0) {}
};

// Takes a scored row's results; those of a row that is not scored are 0.
int64_t keep_row(const Outputs& out, RowValues& rows, int64_t row, const RowSum& sum) {
  const double log_prob = sum.label - sum.lse;
  out.lse[row] = sum.lse;
  rows.log_prob[row] = log_prob;
  if (out.entropy) rows.entropy[row] = sum.entropy;
  if (std::isnan(sum.lse) || sum.lse == INFINITY) return row * 4 + static_cast<int64_t>(Fault::bad_row);
  if (!(log_prob > -INFINITY)) return row * 4 + static_cast<int64_t>(Fault::label);
  return kNoFault;
}

int64_t score_row(const Batch& b, const RowKernels& k, const Outputs& out, RowValues& rows, int64_t row) {
  const int64_t label = b.labels[row];
  RowSum sum{0, 0, 0};
  if (label >= 0) k.forward(b.logits + b.offset(row) * k.itemsize, label, b.options, out.entropy != nullptr, sum);
  return keep_row(out, rows, row, sum);
}

void write_row(const Batch& b, const RowKernels& k, int64_t row, double lse, double weight, const Gradient& g) {
  char* dz = g.data + g.offset(b, row) * k.itemsize;
  const int64_t label = b.labels[row];
  if (label < 0 || weight == 0.0)
    std::memset(dz, 0, static_cast<size_t>(b.options.vocab * k.itemsize));
  else
    k.backward(b.logits + b.offset(row) * k.itemsize, dz, label, weight, lse, b.options);
}

// Sums rows into sequences in row order, whatever thread scored them.
void sum_rows(const Batch& b, const RowValues& rows, const Outputs& out) {
  for (int64_t i = 0; i < b.sequences; ++i) {
    double log_prob = 0, entropy = 0;
    for (int64_t row = b.first_row(i); row < b.first_row(i + 1); ++row) {
      log_prob += rows.log_prob[row];
      if (out.entropy) entropy += rows.entropy[row];
    }
    out.log_prob[i] = log_prob;
    if (out.entropy) out.entropy[i] = entropy;
  }
}

// known: the weights stand already; only the ratios, which need log pi, are formed.
Status form_weights(const Batch& b, const Terms& t, const Outputs& out, bool known) {
  Status result{Fault::none, -1};
  if (t.objective.kind == Kind::none) return result;
  if (!known) *out.clipped = 0;
  *out.total = 0;
  for (int64_t i = 0; i < b.sequences; ++i) {
    const Weight w = weigh(t.objective, sequence(t, i, out.log_prob[i]));
    out.log_ratio[i] = w.log_ratio;
    out.log_target_ratio[i] = w.log_target_ratio;
    if (!known) {
      out.weight[i] = w.weight;
      *out.clipped += w.clipped;
      if (w.out_of_range && result.fault == Fault::none) result = {Fault::weight, i};
    }
    // 0 * -inf = 0
    out.loss[i] = out.weight[i] == 0.0 ? 0.0 : -out.weight[i] * out.log_prob[i];
    *out.total += out.loss[i];
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
  for (int64_t row = 0; row < b.rows; ++row)
    plain &= static_cast<uint64_t>(b.labels[row]) < static_cast<uint64_t>(b.options.vocab) || b.labels[row] == -100;
  for (const double* values : {t.log_proposal, t.reward, t.log_base, t.baseline})
    for (int64_t i = 0; values && i < b.sequences; ++i) plain &= std::isfinite(values[i]);
  for (const double* values : {t.log_target, t.log_z})
    for (int64_t i = 0; values && i < b.sequences; ++i) plain &= values[i] < INFINITY;
  if (t.objective.kind == Kind::reverse_kl || t.objective.kind == Kind::reverse_chi2)
    for (int64_t i = 0; i < b.sequences; ++i) plain &= t.log_target[i] > -INFINITY;
  return plain;
}

Status forward(const Batch& b, const Terms& t, const Outputs& out, bool checked) {
  if (!checked && !is_plain(b, t)) return {Fault::unusual, -1};
  const RowKernels& k = row_kernels(b.dtype);
  RowValues rows(b, out);
  const int64_t fault = for_rows(b, [&](int64_t row, int64_t) { return score_row(b, k, out, rows, row); });
  if (fault != kNoFault) return status(fault);
  sum_rows(b, rows, out);
  return form_weights(b, t, out, false);
}

void backward(const Batch& b, const double* lse, const double* weight, double factor, const double* upstream,
              const Gradient& g) {
  const RowKernels& k = row_kernels(b.dtype);
  if (upstream) factor *= *upstream;
  for_rows(b, [&](int64_t row, int64_t sequence) {
    write_row(b, k, row, lse[row], weight[sequence] * factor, g);
    return kNoFault;
  });
}

Status forward_backward(const Batch& b, const Terms& t, const Outputs& out, bool checked, double factor,
                        const Gradient& g) {
  if (!checked && !is_plain(b, t)) return {Fault::unusual, -1};
  const RowKernels& k = row_kernels(b.dtype);
  for (int64_t i = 0; i < b.sequences; ++i) out.log_prob[i] = at(t.log_proposal, i);
  const Status weights = form_weights(b, t, out, false);
  if (weights.fault != Fault::none) return weights;
  RowValues rows(b, out);
  const int64_t size = scratch_size(b.options);
  const std::unique_ptr<double[]> scratch(new double[size * b.threads]);  // a thread touches its own part only
  const int64_t fault = for_rows(b, [&](int64_t row, int64_t sequence) {
    const double weight = out.weight[sequence] * factor;
    const int64_t label = b.labels[row];
    if (label < 0 || weight == 0.0) {
      const int64_t f = score_row(b, k, out, rows, row);
      if (f == kNoFault) write_row(b, k, row, 0.0, 0.0, g);
      return f;
    }
    RowSum sum;
    k.both(b.logits + b.offset(row) * k.itemsize, g.data + g.offset(b, row) * k.itemsize, label, weight, b.options,
           out.entropy != nullptr, scratch.get() + size * omp_get_thread_num(), sum);
    return keep_row(out, rows, row, sum);
  });
  if (fault != kNoFault) return status(fault);
  sum_rows(b, rows, out);
  return form_weights(b, t, out, true);
}

void scale(const Batch& b, double factor, const double* upstream, const Gradient& g) {
  const auto by = static_cast<float>(factor * *upstream);
  if (by == 1.0f) return;
  const RowKernels& k = row_kernels(b.dtype);
#pragma omp parallel for schedule(static) num_threads(b.threads)
  for (int64_t row = 0; row < b.rows; ++row)
    if (!b.labels || b.labels[row] >= 0) k.scale(g.data + g.offset(b, row) * k.itemsize, b.options.vocab, by);
}

}  // namespace dmf
