// The extension dmfast._C takes raw pointers, sizes and strides, and nothing of torch. So one binary serves every torch
// release, and the build needs no torch. dmfast/kernels makes the arguments and has checked everything that a pointer
// can't tell.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "cpu/loss.h"
#include "cpu/sample.h"
#ifdef DMF_CUDA
#include "cuda/loss.h"
#include "cuda/plan.h"
#endif
#include "random.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct PyBatch : dmf::Batch {
  PyBatch(int dtype, uintptr_t logits, int64_t sequences, int64_t steps, int64_t rows, int64_t stride_sequence,
          int64_t stride_row, uintptr_t cu_seqlens, uintptr_t labels, int64_t vocab, double scale, double softcap,
          int64_t vocab_start, int64_t whole_vocab, int threads, uintptr_t token_weight)
      : dmf::Batch{static_cast<dmf::DType>(dtype),
                   threads,
                   pointer<char>(logits),
                   sequences,
                   steps,
                   rows,
                   stride_sequence,
                   stride_row,
                   pointer<const int64_t>(cu_seqlens),
                   pointer<const int64_t>(labels),
                   {vocab, scale, softcap},
                   vocab_start,
                   whole_vocab,
                   pointer<const double>(token_weight)} {}

  bool reads(uintptr_t from, uintptr_t tokens, uintptr_t starts) const {
    return pointer<char>(from) == logits && pointer<const int64_t>(tokens) == labels &&
           pointer<const int64_t>(starts) == cu_seqlens;
  }
};

// The columns whose bit is set in present lie in block one after the other, stride apart. scalars has the parameter of
// the objective, max_weight, the coefficient of the entropy, the constant of each column, then max_log_return. from may
// have the address, the stride and the bytes of an element (4 or 8) of each column in CPU memory. Then the block is
// filled from there, so that torch need not convert and stack the columns.
struct PyTerms : dmf::Terms {
  PyTerms(int kind, int flags, uintptr_t block, int64_t stride, int present, const std::vector<double>& scalars,
          const std::vector<int64_t>& from)
      : dmf::Terms{{static_cast<dmf::Kind>(kind), flags, scalars.at(0), scalars.at(1), scalars.at(3 + dmf::kColumns)},
                   {},
                   {},
                   scalars.at(2)} {
    double* next = pointer<double>(block);
    for (size_t k = 0; k < from.size(); k += 3) {
      const auto address = static_cast<uintptr_t>(from.at(k));
      const int64_t step = from.at(k + 1), at = static_cast<int64_t>(k / 3) * stride;
      for (int64_t i = 0; i < stride; ++i)
        next[at + i] = from.at(k + 2) == 4 ? static_cast<double>(pointer<const float>(address)[i * step])
                                           : pointer<const double>(address)[i * step];
    }
    for (int c = 0; c < dmf::kColumns; ++c) {
      const bool there = (present >> c & 1) != 0;
      columns[c] = there ? next : nullptr;
      next += there ? stride : 0;
      constants[c] = scalars.at(3 + c);
    }
  }
  PyTerms() : dmf::Terms{{dmf::Kind::none, 0, 0.0, INFINITY}, {}, {}} {}
};

struct PyOutputs : dmf::Outputs {
  PyOutputs(uintptr_t rows_block, uintptr_t sequences_block, int64_t rows, int64_t sequences, uintptr_t total,
            bool entropy, double divide_by)
      : dmf::Outputs{pointer<double>(rows_block),
                     pointer<double>(sequences_block),
                     rows,
                     sequences,
                     pointer<double>(total),
                     entropy,
                     divide_by} {}
};

dmf::Bonus bonus(uintptr_t entropy, uintptr_t weight) {
  return {pointer<const double>(entropy), pointer<const double>(weight)};
}

dmf::Gradient gradient(int dtype, uintptr_t data, int64_t stride_sequence, int64_t stride_row) {
  return {static_cast<dmf::DType>(dtype), pointer<char>(data), stride_sequence, stride_row};
}

dmf::SampleRows sample_rows(int dtype, uintptr_t logits, int64_t rows, int64_t stride_row, int64_t vocab, double scale,
                            double softcap, uint64_t seed, uintptr_t row_ids, uint64_t step, uintptr_t uniforms) {
  return {static_cast<dmf::DType>(dtype),
          pointer<const char>(logits),
          rows,
          stride_row,
          {vocab, scale, softcap},
          seed,
          pointer<const int64_t>(row_ids),
          step,
          pointer<const double>(uniforms)};
}

#ifdef DMF_CUDA
struct PyWorkspace : dmf::cuda::Workspace {
  PyWorkspace(int device, uintptr_t stream, uintptr_t faults, uintptr_t counters, uintptr_t status)
      : dmf::cuda::Workspace{device, pointer<void>(stream), pointer<int64_t>(faults), pointer<unsigned>(counters),
                             pointer<int64_t>(status)} {}
};

// The same functions as for the CPU, but with a workspace. They return when the kernel is queued.
void define_cuda(py::module_& m) {
  namespace cuda = dmf::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
#ifdef DMF_SHIM
  m.attr("device_type") = "cpu";
#else
  m.attr("device_type") = "cuda";
#endif
  m.attr("few_rows") = cuda::kFewRows;
  m.attr("most_parts") = cuda::kMostParts;
  m.def("why_not", &cuda::why_not, release());
  m.def("plan_known", [](int64_t vocab, int64_t itemsize, int64_t limit) {
    const cuda::Plan plan = cuda::plan_known(vocab, itemsize, limit);
    return py::make_tuple(plan.threads, plan.kept, plan.shared);
  });
  m.def("plan_once", [](int64_t vocab, int64_t itemsize) { return cuda::plan_once(vocab, itemsize).threads; });
  py::class_<PyWorkspace>(m, "Workspace").def(py::init<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t>());
  m.def(
      "forward",
      [](const PyBatch& b, const PyTerms& t, const PyOutputs& out, const PyWorkspace& w) {
        cuda::forward(b, t, out, w);
      },
      release());
  m.def(
      "backward",
      [](const PyBatch& b, uintptr_t lse, uintptr_t weight, uintptr_t entropy, uintptr_t bonus_weight, double factor,
         uintptr_t upstream, double unless, int gradient_dtype, uintptr_t gradient_data, int64_t stride_sequence,
         int64_t stride_row, const PyWorkspace& w) {
        cuda::backward(b, pointer<const double>(lse), pointer<const double>(weight), bonus(entropy, bonus_weight),
                       factor, pointer<const double>(upstream), unless,
                       gradient(gradient_dtype, gradient_data, stride_sequence, stride_row), w);
      },
      release());
  m.def(
      "forward_backward",
      [](const PyBatch& b, const PyTerms& t, const PyOutputs& out, double factor, int gradient_dtype,
         uintptr_t gradient_data, int64_t stride_sequence, int64_t stride_row, const PyWorkspace& w) {
        cuda::forward_backward(b, t, out, factor, gradient(gradient_dtype, gradient_data, stride_sequence, stride_row),
                               w);
      },
      release());
  m.def(
      "scale",
      [](const PyBatch& b, double factor, uintptr_t upstream, int gradient_dtype, uintptr_t gradient_data,
         int64_t stride_sequence, int64_t stride_row, const PyWorkspace& w) {
        cuda::scale(b, factor, pointer<const double>(upstream),
                    gradient(gradient_dtype, gradient_data, stride_sequence, stride_row), w);
      },
      release());
  m.def(
      "sample",
      [](int dtype, uintptr_t logits, int64_t rows, int64_t stride_row, int64_t vocab, double scale, double softcap,
         uint64_t seed, uintptr_t row_ids, uint64_t step, uintptr_t uniforms, uintptr_t tokens, uintptr_t log_prob,
         const PyWorkspace& w) {
        cuda::sample(sample_rows(dtype, logits, rows, stride_row, vocab, scale, softcap, seed, row_ids, step, uniforms),
                     pointer<int64_t>(tokens), pointer<double>(log_prob), w);
      },
      release());
}
#endif

py::tuple as_tuple(const dmf::Status& s) { return py::make_tuple(static_cast<int64_t>(s.fault), s.at); }

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "dmfast's compiled kernels. Raw pointers: call them through dmfast.kernels only.";
#ifdef DMF_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels.");
  define_cuda(cuda);
#endif
  m.def("instruction_set", &dmf::instruction_set);

  py::class_<PyBatch>(m, "Batch")
      .def(py::init<int, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t, double,
                    double, int64_t, int64_t, int, uintptr_t>())
      .def("reads", &PyBatch::reads, "Return whether its logits, tokens and cu_seqlens are at these addresses.");
  py::class_<PyTerms>(m, "Terms")
      .def(py::init<int, int, uintptr_t, int64_t, int, const std::vector<double>&, const std::vector<int64_t>&>())
      .def(py::init<>());  // for a call that only scores
  py::class_<PyOutputs>(m, "Outputs").def(py::init<uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, bool, double>());

  m.def("forward", [](const PyBatch& b, const PyTerms& t, const PyOutputs& out, bool checked) {
    dmf::Status status;
    {
      py::gil_scoped_release release;
      status = dmf::forward(b, t, out, checked);
    }
    return as_tuple(status);
  });
  m.def("backward", [](const PyBatch& b, uintptr_t lse, uintptr_t weight, uintptr_t entropy, uintptr_t bonus_weight,
                       double factor, uintptr_t upstream, int gradient_dtype, uintptr_t gradient_data,
                       int64_t stride_sequence, int64_t stride_row) {
    py::gil_scoped_release release;
    dmf::backward(b, pointer<const double>(lse), pointer<const double>(weight), bonus(entropy, bonus_weight), factor,
                  pointer<const double>(upstream),
                  gradient(gradient_dtype, gradient_data, stride_sequence, stride_row));
  });
  m.def(
      "backward_of",
      [](const PyBatch& b, const PyOutputs& out, uintptr_t entropy, uintptr_t bonus_weight, double factor,
         uintptr_t upstream, int gradient_dtype, uintptr_t gradient_data, int64_t stride_sequence, int64_t stride_row) {
        if (out.sequences == 0) return;  // the blocks have no memory then
        py::gil_scoped_release release;
        dmf::backward(b, &out.lse(0), &out.weight(0), bonus(entropy, bonus_weight), factor,
                      pointer<const double>(upstream),
                      gradient(gradient_dtype, gradient_data, stride_sequence, stride_row));
      },
      "Run backward with the log-sum-exps and the weights that forward has written to out.");
  m.def("forward_backward",
        [](const PyBatch& b, const PyTerms& t, const PyOutputs& out, bool checked, double factor, int gradient_dtype,
           uintptr_t gradient_data, int64_t stride_sequence, int64_t stride_row) {
          dmf::Status status;
          {
            py::gil_scoped_release release;
            status = dmf::forward_backward(b, t, out, checked, factor,
                                           gradient(gradient_dtype, gradient_data, stride_sequence, stride_row));
          }
          return as_tuple(status);
        });
  m.def("scale", [](const PyBatch& b, double factor, uintptr_t upstream, int gradient_dtype, uintptr_t gradient_data,
                    int64_t stride_sequence, int64_t stride_row) {
    py::gil_scoped_release release;
    dmf::scale(b, factor, pointer<const double>(upstream),
               gradient(gradient_dtype, gradient_data, stride_sequence, stride_row));
  });
  m.def("sample", [](int dtype, uintptr_t logits, int64_t rows, int64_t stride_row, int64_t vocab, double scale,
                     double softcap, uint64_t seed, uintptr_t row_ids, uint64_t step, uintptr_t uniforms, int threads,
                     uintptr_t tokens, uintptr_t log_prob) {
    py::gil_scoped_release release;
    const dmf::Status status =
        dmf::sample(sample_rows(dtype, logits, rows, stride_row, vocab, scale, softcap, seed, row_ids, step, uniforms),
                    threads, pointer<int64_t>(tokens), pointer<double>(log_prob));
    return status.at;  // the first bad row, or -1
  });
  m.def(
      "philox",
      [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
        const dmf::Philox r = dmf::philox({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
        return std::array<uint32_t, 4>{r.x[0], r.x[1], r.x[2], r.x[3]};
      },
      "The generator of csrc/random.h, for its known-answer test.");
  m.def(
      "weigh",
      [](const PyTerms& t, double log_prob, double log_proposal, double log_target, double log_z, double reward,
         double log_base, double baseline) {
        const dmf::Weight w =
            dmf::weigh(t.objective, {log_prob, log_proposal, log_target, log_z, reward, log_base, baseline});
        return py::make_tuple(w.log_ratio, w.log_target_ratio, w.weight, w.clipped, w.out_of_range);
      },
      "The formula of csrc/objective.h for one sequence, for the test that holds it to dmfast.objectives.");
}
