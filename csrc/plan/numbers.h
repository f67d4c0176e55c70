// Numbers as Python hands them over.
#pragma once
#include <torch/csrc/autograd/python_variable.h>

#include "../tensors.h"

namespace fusedopt::plan {

// The value of a one-element tensor.
inline double scalar_of(const at::Tensor& tensor) {
  // Around torch's dispatcher for the usual ones: it costs more than the rest of a small step's preparation.
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!foreign(impl, at::kCPU) && impl->numel() == 1) {
    if (tensor.scalar_type() == at::kFloat) return *static_cast<const float*>(impl->data());
    if (tensor.scalar_type() == at::kDouble) return *static_cast<const double*>(impl->data());
  }
  return tensor.item<double>();
}

// Any of an int, a float, a bool, a one-element tensor, or something with __float__. Returns false for anything else.
inline bool to_double(PyObject* value, double& out) {
  if (PyFloat_Check(value)) {
    out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.numel() != 1) return false;
    out = scalar_of(tensor);
    return true;
  }
  out = PyFloat_AsDouble(value);
  if (out == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

}  // namespace fusedopt::plan
