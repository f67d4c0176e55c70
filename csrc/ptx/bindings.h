// The interpreter in Python, as fusedopt._C.ptx.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void define_ptx(pybind11::module_& m);

}  // namespace fusedopt
