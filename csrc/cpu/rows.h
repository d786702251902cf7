// One row of logits at a time: the interface between the kernels of rows.cpp, which are compiled once per
// instruction set, and loss.cpp, which runs them over rows on threads.
#pragma once
#include "../batch.h"

namespace dmf {

struct RowSum {
  double lse;      // log-sum-exp of scale * cap(z); NaN if the row holds NaN or +inf
  double label;    // scale * cap(z[label]); 0 where the label is kElsewhere
  double entropy;  // -sum p log p, nats
};

// Reads the row once.
using ForwardRow = void (*)(const void* z, int64_t label, const RowOptions&, bool entropy, RowSum&);

// dz[v] = weight * scale * cap'(z[v]) * (softmax[v] - (v == label)), rounded once to the gradient's dtype. dz may be z
// where they have one dtype; else they share no memory. The label may be kElsewhere here and in ForwardRow.
using BackwardRow = void (*)(const void* z, void* dz, int64_t label, double weight, double lse, const RowOptions&);

// Both, for a weight that is known before: forward's terms are kept in scratch (an fp32 dz: in dz) and only scaled.
// Where out.label - out.lse is not finite, dz is undefined.
using BothRow = void (*)(const void* z, void* dz, int64_t label, double weight, const RowOptions&, bool entropy,
                         double* scratch, RowSum& out);

// dz[v] *= factor
using ScaleRow = void (*)(void* dz, int64_t vocab, float factor);

struct RowKernels {
  ForwardRow forward;
  BackwardRow backward;
  BothRow both;
  ScaleRow scale;  // of a gradient
  int64_t itemsize, gradient_itemsize;
};

// How many doubles of scratch a row of BothRow takes.
int64_t scratch_size(const RowOptions&);

// For logits of a dtype and their gradient: the same dtype, or 16 bits for fp32 logits. Throws where there are none.
const RowKernels& row_kernels(DType logits, DType gradient);

// The instruction set that the row kernels run on here: "x86-64-v4", "x86-64-v3" or "baseline".
const char* instruction_set();

}  // namespace dmf
