// What of a tensor lies in this process.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace fusedopt::plan {

// Note [Shards]
// A DTensor is a tensor of Python's that stands for one which is dealt out over processes; what lies in this one is its
// attribute `_local_tensor`, a plain tensor. Kernels work on that. All that asks for a tensor asks here first, and
// costs nothing where there are none: whether a tensor's kind is Python's is one bit of what is read of it anyway.

namespace names {

inline PyObject* local_tensor() {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return name;
}
inline PyObject* spec() {
  static PyObject* const name = PyUnicode_InternFromString("_spec");
  return name;
}

}  // namespace names

// An attribute of an object that keeps it alive, or null where it has none of that name.
inline PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return value;
}

[[gnu::noinline]] inline const at::Tensor& local_of_dtensor(PyObject* object) {
  PyObject* const local = attribute(object, names::local_tensor());
  return THPVariable_Unpack(local && THPVariable_Check(local) ? local : object);
}

// The tensor that kernels work on: the local part of a DTensor, or the tensor itself. Valid for as long as `object` and
// what it holds.
[[gnu::always_inline]] inline const at::Tensor& local_of(PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.unsafeGetTensorImpl()->is_python_dispatch()) [[likely]]
    return tensor;
  return local_of_dtensor(object);
}

// The Python object of a tensor, which lives as long as the tensor.
inline PyObject* object_of(const at::Tensor& tensor) {
  PyObject* const object = THPVariable_Wrap(tensor);
  Py_XDECREF(object);
  return object;
}

// Whether two tensors, one of them a DTensor, are dealt out alike: over the same mesh, with the same placements.
inline bool dealt_out_alike(PyObject* a, PyObject* b) {
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  PyObject* const one = attribute(a, names::spec());
  PyObject* const other = attribute(b, names::spec());
  if (!one || !other) return false;
  if (one == other) return true;
  for (PyObject* name : {mesh, placements}) {
    const auto x = py::reinterpret_steal<py::object>(PyObject_GetAttr(one, name));
    const auto y = py::reinterpret_steal<py::object>(PyObject_GetAttr(other, name));
    const int same = x && y ? PyObject_RichCompareBool(x.ptr(), y.ptr(), Py_EQ) : -1;
    if (same < 0) PyErr_Clear();
    if (same != 1) return false;
  }
  return true;
}

}  // namespace fusedopt::plan
