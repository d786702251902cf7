// The interface between the kernels of row_kernels.h, which are compiled once per instruction set and work on one row
// of logits, and loss.cpp, which runs them over rows on threads.
#pragma once
#include "../batch.h"

namespace dmf {

struct RowSum {
  double lse;      // log-sum-exp of scale * cap(z); NaN if the row holds NaN or +inf
  double label;    // scale * cap(z[label]); 0 where the label is kElsewhere
  double entropy;  // -sum p log p, nats
};

// The factors of a row's gradient: weight times the gradient of -log pi of its label, plus bonus times that of -H.
struct RowWeight {
  double weight, bonus;
  double entropy;  // H; any value where bonus is 0
  bool is_zero() const { return weight == 0.0 && bonus == 0.0; }
};

// Reads the row once.
using ForwardRow = void (*)(const void* z, int64_t label, const RowOptions&, bool entropy, RowSum&);

// Writes dz[v] = scale * cap'(z[v]) * (weight * (p[v] - (v == label)) + bonus * p[v] * (log p[v] + H)), where p is the
// softmax, rounded once to the gradient's dtype. dz may be z where they have one dtype. Otherwise they share no memory.
// The label may be kElsewhere here and in ForwardRow.
using BackwardRow = void (*)(const void* z, void* dz, int64_t label, const RowWeight&, double lse, const RowOptions&);

// Does both for a weight that is known before. forward's terms are kept in scratch, or in an fp32 dz, and only scaled.
// A bonus uses the entropy that this call computes. Where out.label - out.lse is not finite, dz is undefined.
using BothRow = void (*)(const void* z, void* dz, int64_t label, const RowWeight&, const RowOptions&, bool entropy,
                         double* scratch, RowSum& out);

// Multiplies dz[v] by factor.
using ScaleRow = void (*)(void* dz, int64_t vocab, float factor);

struct RowKernels {
  ForwardRow forward;
  BackwardRow backward;
  BothRow both;
  ScaleRow scale;  // scales a gradient
  int64_t itemsize, gradient_itemsize;
};

// Returns how many doubles of scratch BothRow takes for a row.
int64_t scratch_size(const RowOptions&);

// Returns the kernels for the dtypes of logits and gradient, which are equal, or fp32 and 16 bits. Throws for others.
RowKernels row_kernels(DType logits, DType gradient);

// Return the kernels for logits of these dtypes, each from a file of its own.
RowKernels rows_of_fp32(DType gradient);
RowKernels rows_of_16_bits(DType dtype);

// Returns the instruction set that the row kernels use on this machine: "x86-64-v4", "x86-64-v3" or "baseline".
const char* instruction_set();

}  // namespace dmf
