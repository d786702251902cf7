// The inputs and outputs of the fused losses on the CPU and on CUDA, as plain pointers, sizes and strides.
#pragma once
#include <cstdint>

#include "objective.h"

namespace dmf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct RowOptions {
  int64_t vocab;   // the number of logits in a row
  double scale;    // 1 / temperature
  double softcap;  // 0: none
};

constexpr int64_t kIgnore = -100;  // the label of a row that is not scored and not read
constexpr int64_t kElsewhere = -1;
constexpr double kMaxTokenWeight = 1e30;  // dmfast.kernels.batch has the same constant

// A batch of logits: (B,T,V) with any batch and time strides, or packed (N,V) with cu_seqlens. labels holds n_rows
// tokens in sequence order. A row holds the logits of tokens [vocab_start, vocab_start + options.vocab) of a vocabulary
// of whole_vocab tokens. A row whose label lies outside of these tokens is scored, too: its terms count in its
// log-sum-exp, another shard has its label's logit, and its gradient is the softmax without the one-hot. token_weight
// multiplies the part of a row's log pi in the gradient, and nothing else.
struct Batch {
  DType dtype;
  int threads;  // it stands beside dtype so that the later members keep their offsets, which ptxas's code depends on
  char* logits;
  int64_t sequences, steps, rows;       // rows = sequences * steps, or N
  int64_t stride_sequence, stride_row;  // in logits; a packed batch has stride_row only
  const int64_t* cu_seqlens;            // sequences + 1, or null
  const int64_t* labels;                // (rows), each kIgnore or a token of the whole vocabulary
  RowOptions options;
  int64_t vocab_start, whole_vocab;
  const double* token_weight = nullptr;  // (rows), finite on CUDA, 0 where a row is not scored; null: all are 1

  DMF_HD bool is_token(int64_t label) const { return label >= 0 && label < whole_vocab; }
  DMF_HD bool is_shard() const { return options.vocab != whole_vocab; }
  // Returns the column of a label, or kElsewhere.
  DMF_HD int64_t column(int64_t label) const {
    const int64_t here = label - vocab_start;
    return here >= 0 && here < options.vocab ? here : kElsewhere;
  }

  // Returns the factor of a row's share of the gradient.
  DMF_HD double share(int64_t row) const { return token_weight ? token_weight[row] : 1.0; }

  DMF_HD int64_t first_row(int64_t sequence) const { return cu_seqlens ? cu_seqlens[sequence] : sequence * steps; }
  DMF_HD int64_t sequence_of(int64_t row) const {
    if (!cu_seqlens) return row / steps;
    int64_t low = 0, high = sequences;  // low ends at the last start at or before row, past empty sequences
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (cu_seqlens[middle] <= row ? low : high) = middle;
    }
    return low;
  }
  DMF_HD int64_t offset(int64_t row) const {
    return cu_seqlens ? row * stride_row : row / steps * stride_sequence + row % steps * stride_row;
  }
};

// The columns of Terms, in the order of dmfast.objectives.COLUMNS.
enum Column : int { kLogProposal, kLogTarget, kLogZ, kReward, kLogBase, kBaseline, kColumns };

// The per-sequence inputs, fp64 columns of one block. A column that is not given is null. A constant takes its place,
// which is 0 where the objective does not need it.
struct Terms {
  Objective objective;
  const double* columns[kColumns];
  double constants[kColumns];
  double entropy_coefficient = 0.0;  // the factor of the entropy in the loss; 0: the loss has no entropy

  DMF_HD bool has(Column c) const { return columns[c] != nullptr; }
  DMF_HD double at(Column c, int64_t i) const { return has(c) ? columns[c][i] : constants[c]; }
};

// The tensor that a gradient is written to: logits itself, or one of the same shape with strides of its own. The
// gradient of fp32 logits may have 16 bits. It then shares no memory with the logits (cuda/loss.cu says why).
struct Gradient {
  DType dtype;
  char* data;
  int64_t stride_sequence, stride_row;
  DMF_HD int64_t offset(const Batch& b, int64_t row) const {
    return b.cu_seqlens ? row * stride_row : row / b.steps * stride_sequence + row % b.steps * stride_row;
  }
};

// The part of an entropy bonus in a gradient, which is the gradient of -sum_i weight[i] H_i. A row's dH/dz_j is
// -p_j (log p_j + H), through scale and softcap. There is no bonus where entropy is null.
struct Bonus {
  const double* entropy;  // (rows), of the whole vocabulary
  const double* weight;   // (sequences); on CUDA it may be null, and constant then takes its place
  double constant = 0.0;
};

// Returns the loss of a sequence, -A log pi - coefficient * H, where 0 * -inf = 0.
DMF_HD double loss_of(double weight, double log_prob, double coefficient, double entropy) {
  const double loss = weight == 0.0 ? 0.0 : -weight * log_prob;
  return coefficient == 0.0 ? loss : loss - coefficient * entropy;
}

DMF_HD Sequence sequence(const Terms& t, int64_t i, double log_prob) {
  Sequence x{};
  x.log_prob = log_prob;
  x.log_proposal = t.has(kLogProposal) ? t.at(kLogProposal, i) : log_prob;
  x.log_target = t.at(kLogTarget, i);
  x.log_z = t.at(kLogZ, i);
  x.reward = t.at(kReward, i);
  x.log_base = t.at(kLogBase, i);
  x.baseline = t.at(kBaseline, i);
  return x;
}

// The results in fp64: a block for the rows, (2 or 3, rows), and one for the sequences, (2, sequences) when only
// scoring, else (7, sequences). dmfast.kernels.batch names their columns.
struct Outputs {
  double* rows_block;
  double* sequences_block;
  int64_t rows, sequences;
  double* total;  // one number, the sum of loss in a fixed order over divide_by; null when only scoring
  bool entropy;   // whether the entropy is computed
  double divide_by;

  DMF_HD double& lse(int64_t row) const { return rows_block[row]; }
  DMF_HD double& label(int64_t row) const { return rows_block[rows + row]; }  // the label's logit; 0 if elsewhere
  DMF_HD double& row_entropy(int64_t row) const { return rows_block[2 * rows + row]; }
  DMF_HD double& log_prob(int64_t i) const { return sequences_block[i]; }
  DMF_HD double& sequence_entropy(int64_t i) const { return sequences_block[sequences + i]; }
  DMF_HD double& log_ratio(int64_t i) const { return sequences_block[2 * sequences + i]; }
  DMF_HD double& log_target_ratio(int64_t i) const { return sequences_block[3 * sequences + i]; }
  DMF_HD double& weight(int64_t i) const { return sequences_block[4 * sequences + i]; }
  DMF_HD double& loss(int64_t i) const { return sequences_block[5 * sequences + i]; }     // loss_of
  DMF_HD double& clipped(int64_t i) const { return sequences_block[6 * sequences + i]; }  // 1 where a bound acts
};

enum class Fault : int64_t {
  none = 0,
  bad_row = 1,  // NaN or +inf in a scored row; at: the row
  label = 2,    // the label's logit is -inf; at: the row
  weight = 3,   // the weight does not fit fp32; at: the sequence
  unusual = 4,  // CPU: is_plain was false and nothing was done. CUDA: a label is no token; at: the row
  input = 5,    // CUDA: a per-sequence input has an invalid value; at: the sequence
};
struct Status {
  Fault fault;
  int64_t at;  // the first row or sequence with the fault
};

}  // namespace dmf
