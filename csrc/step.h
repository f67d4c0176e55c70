// What one step asks for; the C++ side of fusedopt.backends.StepRequest.
#pragma once
#include <ATen/core/Tensor.h>

#include <stdexcept>
#include <string>

#include "tables.h"

namespace fusedopt {

// Which passes a step makes; see Note [Three modes] in fusedopt/backends/base.py.
enum class Mode { kBare, kCheck, kFull };

// A number, or the tensor on the plan's device that holds it (borrowed for the step).
struct Number {
  double value = 0;
  const at::Tensor* live = nullptr;
};

struct StepSettings {
  Number scale{1};
  bool has_found_inf = false;
  Number found_inf;
  bool check = false;
  StatisticsSettings norm{NormKind::kNone, 2};
  Number max_norm;
  bool error_if_nonfinite = false;
  double clip_value = 0;  // infinite without value clipping
  bool write_back = false;

  Mode mode() const {
    if (norm.kind != NormKind::kNone) return Mode::kFull;
    return check ? Mode::kCheck : Mode::kBare;
  }
};

// One distinct set of hyperparameters. Those that are tensors on the plan's device stay there: `live` has the tensor
// (borrowed from a param group) and `value` NaN. Compared by its bytes.
struct HyperValues {
  double value[kMaxHyper];
  c10::TensorImpl* live[kMaxHyper];
};

// What is said of a norm that cannot be clipped to.
[[noreturn]] inline void refuse_norm(double norm) {
  throw std::runtime_error("The total norm of the gradients is " + std::to_string(norm) +
                           ", so it cannot be clipped. To disable this error and scale the gradients by the "
                           "non-finite norm anyway, set `error_if_nonfinite=False`");
}

}  // namespace fusedopt
