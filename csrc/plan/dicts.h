// Looking into Python's dicts, lists and weak references.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace fusedopt::plan {

// The items of a list or tuple, held for as long as they are looked at.
class Items {
 public:
  Items(PyObject* sequence, const char* what) : fast_(PySequence_Fast(sequence, "")) {
    if (fast_) return;
    PyErr_Clear();
    throw py::type_error(std::string(what) + " is not a list");
  }
  ~Items() { Py_DECREF(fast_); }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_); }
  PyObject* const* begin() const { return PySequence_Fast_ITEMS(fast_); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_, i); }

 private:
  PyObject* fast_;
};

// The value beside `key` at a position of a dict, or null when another key is there.
[[gnu::always_inline]] inline PyObject* value_at(PyObject* dict, Py_ssize_t position, PyObject* key) {
  PyObject *found, *value;
  return PyDict_Next(dict, &position, &found, &value) && found == key ? value : nullptr;
}

// What a weak reference refers to, for comparing only, or null.
inline PyObject* referent(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(reference, &object) < 0) PyErr_Clear();
  Py_XDECREF(object);
  return object;
#else
  return PyWeakref_GET_OBJECT(reference);
#endif
}

// Whether `object` is a pair (tensor, weak reference), as hidden step counts are kept.
inline bool is_hidden_count(PyObject* object) {
  return PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2 &&
         THPVariable_Check(PyTuple_GET_ITEM(object, 0)) && PyWeakref_Check(PyTuple_GET_ITEM(object, 1));
}

}  // namespace fusedopt::plan
