// SGD with momentum. The formula is fusedopt/rules/sgd.py; operations and their order are the same.
#pragma once
#include "common.h"

namespace fusedopt {

struct Sgd {
  static constexpr const char* kName = "sgd";

  enum Hyper { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize };
  static constexpr HyperKey kKeys[] = {{"lr", kLr, 1},
                                       {"momentum", kMomentum, 1},
                                       {"dampening", kDampening, 1},
                                       {"weight_decay", kWeightDecay, 1},
                                       {"nesterov", kNesterov, HyperKey::kFlag},
                                       {"maximize", kMaximize, HyperKey::kFlag}};
  static constexpr const char* kStates[] = {"momentum_buffer"};
  static constexpr unsigned kSquares = 0;

  static constexpr unsigned kDecay = 1, kWithMomentum = 2, kFirst = 4, kWithNesterov = 8, kVariants = 16;

  FUSEDOPT_HD static constexpr unsigned columns(unsigned variant) { return variant & kWithMomentum ? 0b001 : 0b000; }

  FUSEDOPT_HD static unsigned variant(const double* h, double step) {
    unsigned v = h[kWeightDecay] != 0 ? kDecay : 0u;
    if (h[kMomentum] == 0) return v;
    return v | kWithMomentum | (step == 1 ? kFirst : 0u) | (h[kNesterov] != 0 ? kWithNesterov : 0u);
  }

  template <class T>
  struct Scalars {
    T sign, decay, momentum, one_minus_dampening, lr;

    template <class U>
    FUSEDOPT_HD Scalars<U> as() const {
      return {U(sign), U(decay), U(momentum), U(one_minus_dampening), U(lr)};
    }
  };

  FUSEDOPT_HD static Scalars<double> derive(const double* h, double /*step*/) {
    return {h[kMaximize] != 0 ? -1.0 : 1.0, h[kWeightDecay], h[kMomentum], 1.0 - h[kDampening], h[kLr]};
  }

  // The first step of a parameter ignores what is in its buffer: nothing real has been stored there yet.
  template <unsigned V, class T>
  FUSEDOPT_HD static void update(const Scalars<T>& s, T g, T& p, T& buffer, T&, T&) {
    g *= s.sign;
    if constexpr (V & kDecay) g += s.decay * p;
    if constexpr (V & kWithMomentum) {
      buffer = V & kFirst ? g : s.momentum * buffer + s.one_minus_dampening * g;
      g = V & kWithNesterov ? g + s.momentum * buffer : buffer;
    }
    p -= s.lr * g;
  }
};

}  // namespace fusedopt
