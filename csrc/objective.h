// The one formula of dmfast for C++ and CUDA: from the log-probabilities of one sequence to its
// weight A in loss = -(1/B) sum_i A_i log pi(x_i). Its twin is dmfast/objectives.py, and
// tests/test_kernels.py holds the two together. Per-sequence values are fp64 because at 1,024 tokens
// log pi is about -11,500, where one fp32 ulp is 1e-3 nats.
#pragma once
#include <cfloat>
#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DMF_HD __host__ __device__ inline
#else
#define DMF_HD inline
#endif

namespace dmf {

// The numbers are those of dmfast.objectives.KINDS.
enum class Kind : int {
  none = 0,
  dpg = 1,
  reverse_kl = 2,
  js = 3,
  tv = 4,
  chi2 = 5,
  reverse_chi2 = 6,
  reinforce = 7,
  reinforce_p = 8,
  kl_control = 9,
};

struct Objective {
  Kind kind;
  bool on_policy;     // rho = 1 exactly
  bool normalize;     // false: A is multiplied by Z
  double beta;        // kl_control
  double log_scale;   // reinforce_p: R = exp(log P - log_scale)
  double max_weight;  // +inf: not clipped
};

struct Sequence {
  double log_prob;      // log pi(x)
  double log_proposal;  // log q(x); the detached log pi(x) on-policy where the sampler stored none
  double log_target;    // log P(x), -inf where P = 0
  double log_z;         // -inf: a context in which every P is 0
  double reward;        // R(x)
  double log_base;      // log a(x)
  double baseline;      // subtracted from r
};

struct Weight {
  double log_ratio;         // log rho = log pi(x) - log q(x)
  double log_target_ratio;  // log u = log P(x) - log Z - log q(x)
  double weight;            // A
  bool clipped;
  bool out_of_range;  // A does not fit fp32, or is NaN
};

DMF_HD bool has_target(Kind k) {
  return k == Kind::dpg || k == Kind::reverse_kl || k == Kind::js || k == Kind::tv || k == Kind::chi2 ||
         k == Kind::reverse_chi2;
}

DMF_HD double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

DMF_HD Weight weigh(const Objective& o, const Sequence& x) {
  constexpr double kLog2 = 0.69314718055994530942;
  const bool empty = x.log_z == -INFINITY;
  Weight out{};
  out.log_ratio = o.on_policy ? 0.0 : x.log_prob - x.log_proposal;
  out.log_target_ratio = empty ? -INFINITY : x.log_target - x.log_z - x.log_proposal;
  const double log_rho = out.log_ratio, log_u = out.log_target_ratio;
  const double log_pi = o.on_policy ? x.log_proposal : x.log_prob;
  // normalize = false multiplies by Z inside the exponent, where Z = e^-900 still is a number
  const double shift = !o.normalize && has_target(o.kind) && !empty ? x.log_z : 0.0;
  const double rho = exp(log_rho + shift);
  const double log_t = log_rho - log_u;  // t = pi/p

  double value = 0;  // rho * r
  switch (o.kind) {
    case Kind::none:
      break;
    case Kind::dpg:
      value = exp(log_u + shift);
      break;
    case Kind::reverse_kl:
      value = -rho * (log_t + 1.0);
      break;
    case Kind::js:
      value = rho * (softplus(-log_t) - kLog2);
      break;
    case Kind::tv:
      value = log_t > 0 ? -0.5 * rho : (log_t < 0 ? 0.5 * rho : 0.0);
      break;
    case Kind::chi2:
      value = exp(2.0 * log_u - log_rho + shift) - rho;
      break;
    case Kind::reverse_chi2:
      value = 2.0 * (rho - exp(2.0 * log_rho - log_u + shift));
      break;
    case Kind::reinforce:
      value = rho * x.reward;
      break;
    case Kind::reinforce_p:
      value = exp(log_rho + x.log_target - o.log_scale);
      break;
    case Kind::kl_control:
      value = rho * (x.reward - o.beta * (log_pi - x.log_base));
      break;
  }
  double a = value - (x.baseline != 0.0 ? x.baseline * rho : 0.0);
  if (empty && has_target(o.kind)) a = 0.0;
  if (fabs(a) > o.max_weight) {
    a = a > 0 ? o.max_weight : -o.max_weight;
    out.clipped = true;
  }
  out.weight = a;
  out.out_of_range = !(fabs(a) <= FLT_MAX);
  return out;
}

}  // namespace dmf
