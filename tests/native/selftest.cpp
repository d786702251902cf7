// The CPU kernels against a reference in long double, without Python: for machines that CI can only emulate.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/loss.h"
#include "cpu/simd.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what, const char* dtype, long v, double got, double want) {
  if (ok) return;
  std::printf("FAILED %s, %s, V = %ld: got %.17g, expected %.17g\n", what, dtype, v, got, want);
  ++failures;
}

template <class T, class Out = T>
void check(dmf::DType dtype, const char* name, double step, dmf::DType of_gradient) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 4);
  for (const long v : {1L, 2L, 31L, 513L, 4099L})
    for (const double softcap : {0.0, 20.0})
      for (const double scale : {1.0, 0.6}) {
        const long sequences = 2, steps = 2;
        std::vector<T> z(sequences * steps * v);
        std::vector<Out> dz(z.size());
        for (auto& x : z) dmf::from_float(normal(random), x);
        if (v > 31) dmf::from_float(-INFINITY, z[0]);
        std::vector<int64_t> labels = {v - 1, v / 2, -100, v / 3};
        const double log_target[] = {-9.0, -8.5}, log_proposal[] = {-9.5, -8.0}, log_z[] = {0.1, 0.1};
        const double columns[] = {-9.5, -8.0, -9.0, -8.5, 0.1, 0.1, 1, 1};  // and the baseline
        dmf::Batch batch{dtype,
                         2,
                         reinterpret_cast<char*>(z.data()),
                         sequences,
                         steps,
                         sequences * steps,
                         steps * v,
                         v,
                         nullptr,
                         labels.data(),
                         {v, scale, softcap},
                         0,
                         v};
        dmf::Terms terms{{dmf::Kind::dpg, dmf::kHasTarget, 0.0, INFINITY},
                         {columns, columns + 2, columns + 4, nullptr, nullptr, columns + 6},
                         {}};
        double rows[12], per_sequence[14], total = 0;
        dmf::Outputs out{rows, per_sequence, 4, 2, &total, true, 1.0};
        const double *lse = rows, *log_prob = per_sequence, *weight = &out.weight(0);
        const dmf::Status status = dmf::forward(batch, terms, out, false);
        expect(status.fault == dmf::Fault::none, "status", name, v, static_cast<double>(status.fault), 0);
        // the bonus in sequence 0 alone
        const double of_bonus[2] = {0.3, 0.0};
        dmf::backward(batch, lse, weight, {&out.row_entropy(0), of_bonus}, 0.5, nullptr,
                      {of_gradient, reinterpret_cast<char*>(dz.data()), steps * v, v});

        for (long i = 0; i < sequences; ++i) {
          long double expected = 0;
          for (long t = 0; t < steps; ++t) {
            const long row = i * steps + t;
            auto y = [&](long k) -> long double {
              const long double x = dmf::to_float(z[row * v + k]);
              return scale * (softcap > 0 ? softcap * std::tanh(x / softcap) : x);
            };
            if (labels[row] < 0) {
              for (long k = 0; k < v; ++k)
                expect(dmf::to_float(dz[row * v + k]) == 0, "masked gradient", name, v, 1, 0);
              continue;
            }
            long double max = -INFINITY, sum = 0;
            for (long k = 0; k < v; ++k) max = std::max(max, y(k));
            for (long k = 0; k < v; ++k) sum += std::exp(y(k) - max);
            const long double exact = max + std::log(sum);
            expected += y(labels[row]) - exact;
            expect(std::fabs(lse[row] - static_cast<double>(exact)) < 1e-6, "lse", name, v, lse[row], exact);
            long double entropy = 0;
            for (long k = 0; k < v; ++k)
              if (y(k) > -INFINITY) entropy -= std::exp(y(k) - exact) * (y(k) - exact);  // 0 * -inf = 0
            for (long k = 0; k < v; ++k) {
              const long double x = dmf::to_float(z[row * v + k]), log_p = y(k) - exact, p = std::exp(log_p);
              const long double slope = softcap > 0 ? 1 - std::pow(std::tanh(x / softcap), 2) : 1;
              const long double bonus = p > 0 ? of_bonus[i] * p * (log_p + entropy) : 0;
              const long double of_row = weight[i] * (p - (k == labels[row] ? 1 : 0)) + bonus;
              const double want = static_cast<double>(0.5L * scale * slope * of_row);
              const double got = dmf::to_float(dz[row * v + k]);
              expect(std::fabs(got - want) <= step * std::fabs(want) + 1e-7, "gradient", name, v, got, want);
            }
          }
          expect(std::fabs(log_prob[i] - static_cast<double>(expected)) < 1e-5, "log_prob", name, v, log_prob[i],
                 expected);
          const double a =
              std::exp(log_target[i] - log_z[i] - log_proposal[i]) - std::exp(log_prob[i] - log_proposal[i]);
          expect(std::fabs(weight[i] - a) < 1e-9 * (1 + std::fabs(a)), "weight", name, v, weight[i], a);
        }
      }
}

}  // namespace

int main() {
  using dmf::DType;
  check<float>(DType::f32, "fp32", 3e-6, DType::f32);
  check<dmf::bf16>(DType::bf16, "bf16", 1.0 / 256, DType::bf16);
  check<dmf::fp16>(DType::f16, "fp16", 1.0 / 1024, DType::f16);
  check<float, dmf::bf16>(DType::f32, "fp32 -> bf16", 1.0 / 256, DType::bf16);
  check<float, dmf::fp16>(DType::f32, "fp32 -> fp16", 1.0 / 1024, DType::f16);
  std::printf("%s: %d failures, instruction set %s\n", failures ? "FAILED" : "ok", failures, dmf::instruction_set());
  return failures != 0;
}
