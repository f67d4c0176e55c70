// Adam and AdamW. The formula is fusedopt/rules/adam.py; operations and their order are the same.
#pragma once
#include "common.h"

namespace fusedopt {

struct Adam {
  static constexpr const char* kName = "adam";

  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kAmsgrad, kMaximize, kDecoupled };
  static constexpr HyperKey kKeys[] = {{"lr", kLr, 1},
                                       {"betas", kBeta1, 2},
                                       {"eps", kEps, 1},
                                       {"weight_decay", kWeightDecay, 1},
                                       {"amsgrad", kAmsgrad, HyperKey::kFlag},
                                       {"maximize", kMaximize, HyperKey::kFlag},
                                       {"decoupled_weight_decay", kDecoupled, HyperKey::kFlag}};
  static constexpr const char* kStates[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr unsigned kSquares = 0b110;  // see Note [Means of squares] in csrc/storage.h

  // What differs per instantiation, so that no pass pays for an option that is off.
  static constexpr unsigned kCoupledDecay = 1, kWithMax = 2, kVariants = 4;

  FUSEDOPT_HD static constexpr unsigned columns(unsigned variant) { return variant & kWithMax ? 0b111 : 0b011; }

  FUSEDOPT_HD static unsigned variant(const double* h, double /*step*/) {
    return (h[kWeightDecay] != 0 && h[kDecoupled] == 0 ? kCoupledDecay : 0u) | (h[kAmsgrad] != 0 ? kWithMax : 0u);
  }

  template <class T>
  struct Scalars {
    T sign, decay, keep, beta1, one_minus_beta1, beta2, one_minus_beta2, inv_sqrt_correction2, eps, step_size;

    template <class U>
    FUSEDOPT_HD Scalars<U> as() const {
      return {U(sign),
              U(decay),
              U(keep),
              U(beta1),
              U(one_minus_beta1),
              U(beta2),
              U(one_minus_beta2),
              U(inv_sqrt_correction2),
              U(eps),
              U(step_size)};
    }
  };

  // Constants of step number `step` (from 1), all in double so that 1 - beta is exact to the last digit.
  FUSEDOPT_HD static Scalars<double> derive(const double* h, double step) {
    Scalars<double> s;
    s.sign = h[kMaximize] != 0 ? -1.0 : 1.0;
    s.decay = h[kWeightDecay];
    s.keep = h[kDecoupled] != 0 ? 1.0 - h[kLr] * h[kWeightDecay] : 1.0;
    s.beta1 = h[kBeta1];
    s.one_minus_beta1 = 1.0 - h[kBeta1];
    s.beta2 = h[kBeta2];
    s.one_minus_beta2 = 1.0 - h[kBeta2];
    s.inv_sqrt_correction2 = 1.0 / square_root(1.0 - power(h[kBeta2], step));
    s.eps = h[kEps];
    s.step_size = h[kLr] / (1.0 - power(h[kBeta1], step));
    return s;
  }

  template <unsigned V, class T>
  FUSEDOPT_HD static void update(const Scalars<T>& s, T g, T& p, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
    g *= s.sign;
    if constexpr (V & kCoupledDecay) {
      g += s.decay * p;
    } else {
      p *= s.keep;
    }
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g;
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g * g;
    T variance = exp_avg_sq;
    if constexpr (V & kWithMax) {
      max_exp_avg_sq = nan_max(exp_avg_sq, max_exp_avg_sq);
      variance = max_exp_avg_sq;
    }
    p -= s.step_size * exp_avg / (square_root(variance) * s.inv_sqrt_correction2 + s.eps);
  }
};

}  // namespace fusedopt
