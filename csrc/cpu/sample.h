// One-pass sampling on the CPU. It draws a token for each row of logits, with its log-probability.
#pragma once
#include "../sample.h"

namespace dmf {

// Draws tokens (rows) from softmax(scale * cap(logits)) with log_prob (rows). The draw of a row is a function of its
// logits, seed, row id and step. Fault::bad_row says that a row has NaN or +inf, or nothing but -inf.
Status sample(const SampleRows&, int threads, int64_t* tokens, double* log_prob);

}  // namespace dmf
