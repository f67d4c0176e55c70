// What of a tensor lies in this process.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <structmember.h>
#include <torch/csrc/utils/pybind.h>

namespace fusedopt::plan {

// Note [Shards]
// A DTensor is a tensor of Python's that stands for one which is dealt out over processes; what lies in this one is its
// attribute `_local_tensor`, a plain tensor. Kernels work on that. All that asks for a tensor asks here first, and
// costs nothing where there are none: whether a tensor's kind is Python's is one bit of what is read of it anyway.

// An attribute of a DTensor, which keeps it alive. They are slots, so once it is known where they lie in objects of a
// type, they are read from there: asking Python takes ten times as long, and a step asks several times for each tensor.
class Slot {
 public:
  explicit Slot(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  // The object, or null where there is none of that name.
  PyObject* of(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    if (type != type_) find(type);
    if (offset_ > 0) return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
    PyObject* const value = PyObject_GetAttr(object, name_);
    if (!value) PyErr_Clear();
    Py_XDECREF(value);
    return value;
  }

 private:
  [[gnu::noinline]] void find(PyTypeObject* type) {
    type_ = type;
    offset_ = 0;
    const auto attribute =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_));
    if (!attribute) return PyErr_Clear();
    if (!Py_IS_TYPE(attribute.ptr(), &PyMemberDescr_Type)) return;
    const auto* slot = reinterpret_cast<PyMemberDescrObject*>(attribute.ptr());
    if (slot->d_member->type == T_OBJECT_EX) offset_ = slot->d_member->offset;
  }

  PyObject* const name_;
  PyTypeObject* type_ = nullptr;  // that was last asked about
  Py_ssize_t offset_ = 0;
};

inline Slot& local_slot() {
  static Slot slot("_local_tensor");
  return slot;
}

[[gnu::noinline]] inline const at::Tensor& local_of_dtensor(PyObject* object) {
  PyObject* const local = local_slot().of(object);
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

inline Slot& spec_slot() {
  static Slot slot("_spec");
  return slot;
}

// How a DTensor is dealt out, as an object that is another one when that is another way; null for other tensors.
[[gnu::always_inline]] inline PyObject* spec_of(PyObject* object) {
  if (!THPVariable_Unpack(object).unsafeGetTensorImpl()->is_python_dispatch()) [[likely]]
    return nullptr;
  return spec_slot().of(object);
}

// Whether two tensors, one of them a DTensor, are dealt out alike: over the same mesh, with the same placements.
inline bool dealt_out_alike(PyObject* a, PyObject* b) {
  static PyObject* const mesh = PyUnicode_InternFromString("mesh");
  static PyObject* const placements = PyUnicode_InternFromString("placements");
  PyObject* const one = spec_slot().of(a);
  PyObject* const other = spec_slot().of(b);
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
