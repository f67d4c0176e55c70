// What this module reads of torch's tensors, to be compared with what torch says of them.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fusedopt {

// The size of a tensor's object of Python, as torch's headers had it.
size_t tensor_object_bytes();

// What is read of a tensor, by the same inline functions as in a step; with `follow` also what lies behind it: its
// memory, its gradient, and its version, which is counted up by one.
py::dict probe(const py::object& object, bool follow);

}  // namespace fusedopt
