// This file has dmfast's one formula for C++ and CUDA. It leads from the log-probabilities of one sequence to its
// weight A in loss = -(1/B) sum_i A_i log pi(x_i). Its twin is dmfast/objectives.py, and tests/test_kernels.py compares
// them. Per-sequence values are fp64: at 1,024 tokens log pi is about -11,500, where one fp32 ulp is 1e-3 nats.
#pragma once
#include <cfloat>
#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DMF_HD __host__ __device__ inline
#else
#define DMF_HD inline
#endif

namespace dmf {

// The numbers are those of dmfast.objectives.KINDS, whose records say everything else about an objective. C++ gets the
// parts of a record that it needs as flags and as the parameter. So a new objective is a number here and a line in
// weigh.
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
  alpha = 10,
};

enum Flag : int {
  kOnPolicy = 1,        // rho = 1 exactly
  kUnnormalized = 2,    // A is multiplied by Z
  kHasTarget = 4,       // A needs log_target and log_z, and is 0 in a context where every P is 0
  kInfiniteAtZero = 8,  // r is infinite where P = 0
  kFactorLeftOut = 16,  // for alpha: r is not divided by 1 - alpha
};

struct Objective {
  Kind kind;
  int flags;
  double parameter;   // alpha; beta of kl_control; log_scale of reinforce_p, whose R is exp(log P - log_scale)
  double max_weight;  // +inf: not clipped
  double max_log_return = INFINITY;  // for alpha: the bound of log (p/pi)^(1 - alpha)
  DMF_HD bool is(Flag flag) const { return (flags & flag) != 0; }
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
  bool clipped;             // a bound of the weight or of the return acts
  bool out_of_range;        // A does not fit fp32, or is NaN
};

DMF_HD double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// Returns c1 e^e1 + c2 e^e2. A common exponent is taken out, because ratios reach e^+-11,500. So neither inf - inf nor
// 0 * inf arises where the sum has a sign.
DMF_HD double signed_sum(double c1, double e1, double c2, double e2) {
  if (c1 == 0.0) e1 = -INFINITY;
  if (c2 == 0.0) e2 = -INFINITY;
  const double m = fmax(e1, e2);
  if (m == -INFINITY) return 0.0;
  if (m == INFINITY) return (e1 == INFINITY ? c1 : c2) > 0 ? INFINITY : -INFINITY;
  const double s = (c1 == 0.0 ? 0.0 : c1 * exp(e1 - m)) + (c2 == 0.0 ? 0.0 : c2 * exp(e2 - m));
  return s == 0.0 || fabs(s) == INFINITY ? s : s * exp(m);
}

DMF_HD Weight weigh(const Objective& o, const Sequence& x) {
  constexpr double kLog2 = 0.69314718055994530942;
  const bool empty = x.log_z == -INFINITY, on_policy = o.is(kOnPolicy);
  Weight out{};
  out.log_ratio = on_policy ? 0.0 : x.log_prob - x.log_proposal;
  out.log_target_ratio = empty ? -INFINITY : x.log_target - x.log_z - x.log_proposal;
  const double log_rho = out.log_ratio, log_u = out.log_target_ratio;
  const double log_pi = on_policy ? x.log_proposal : x.log_prob;
  const double log_t = log_rho - log_u;  // t = pi/p
  // normalize = false multiplies by Z inside the exponent, because Z itself may underflow, as e^-900 does
  const double shift = o.is(kUnnormalized) && !empty ? x.log_z : 0.0;

  // A = rho * (r - baseline) as first * e^exponent + on_rho * rho
  double first = 0.0, exponent = 0.0, on_rho = 0.0;
  switch (o.kind) {
    case Kind::none:
      break;
    case Kind::dpg:
      first = 1.0, exponent = log_u;
      break;
    case Kind::reverse_kl:
      on_rho = -(log_t + 1.0);
      break;
    case Kind::js:
      on_rho = softplus(-log_t) - kLog2;
      break;
    case Kind::tv:
      on_rho = log_t > 0 ? -0.5 : (log_t < 0 ? 0.5 : 0.0);
      break;
    case Kind::chi2:
      first = 1.0, exponent = 2.0 * log_u - log_rho, on_rho = -1.0;
      break;
    case Kind::reverse_chi2:
      first = -2.0, exponent = 2.0 * log_rho - log_u, on_rho = 2.0;
      break;
    case Kind::reinforce:
      on_rho = x.reward;
      break;
    case Kind::reinforce_p:
      first = 1.0, exponent = log_rho + x.log_target - o.parameter;
      break;
    case Kind::kl_control:
      on_rho = x.reward - o.parameter * (log_pi - x.log_base);
      break;
    case Kind::alpha: {
      const double power = 1.0 - o.parameter;
      double log_return = -power * log_t;  // log (p/pi)^(1 - alpha)
      out.clipped = log_return > o.max_log_return;
      if (out.clipped) log_return = o.max_log_return;
      const double factor = o.is(kFactorLeftOut) ? 1.0 : 1.0 / power;
      if (power == 0.0)
        on_rho = -log_t;
      else if (fabs(log_return) < 1.0)  // the difference of two exponentials would lose its digits here
        on_rho = factor * expm1(log_return);
      else
        first = factor, exponent = log_rho + log_return, on_rho = -factor;
      break;
    }
  }
  double a = signed_sum(first, exponent + shift, on_rho - x.baseline, log_rho + shift);
  if (empty && o.is(kHasTarget)) a = 0.0;
  if (fabs(a) > o.max_weight) {
    a = a > 0 ? o.max_weight : -o.max_weight;
    out.clipped = true;
  }
  out.weight = a;
  out.out_of_range = !(fabs(a) <= FLT_MAX);
  return out;
}

}  // namespace dmf
