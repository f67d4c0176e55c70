// Kernels that are launched from Python.
#pragma once
#include <c10/core/Device.h>
#include <torch/csrc/utils/pybind.h>

#include "device/launch.h"

namespace fusedopt {

// A launcher that calls the methods of a Python object (fusedopt.backends.triton.Launcher) for a kind of device.
device::Launcher python_launcher(const py::object& object, c10::DeviceType device);

// What those methods are given, and where fields are in the tables.
void define_launching(py::module_& m);

}  // namespace fusedopt
