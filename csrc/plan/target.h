// Which device a plan is for.
#pragma once
#include <ATen/core/Tensor.h>

namespace fusedopt::plan {

struct Target {
  c10::DeviceType type = at::kCPU;
  // Whether device kernels run the step (emulated ones too) and not the CPU's own. They read numbers that are tensors
  // on the device there, and know floating-point numbers only.
  bool device_kernels = false;

  // Whether kernels read a number from this tensor themselves.
  bool reads(const at::Tensor& tensor) const { return device_kernels && tensor.device().type() == type; }
};

}  // namespace fusedopt::plan
