#include "bindings.h"

#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;

namespace fusedopt {

void define_ptx(py::module_& m) {
  py::module_ ptx_module = m.def_submodule("ptx", "An interpreter of PTX, for tests. See docs/ptx.md.");
  py::register_exception<ptx::Error>(ptx_module, "PtxError", PyExc_RuntimeError);
  py::class_<ptx::Module, std::shared_ptr<ptx::Module>>(ptx_module, "Module", "PTX, read.")
      .def(py::init([](const std::string& text, const std::string& file) {
             return std::const_pointer_cast<ptx::Module>(ptx::parse(text, file));
           }),
           py::arg("text"), py::arg("file"))
      .def_readonly("architecture", &ptx::Module::architecture)
      .def_property_readonly("kernels",
                             [](const ptx::Module& module) {
                               std::vector<std::string> names;
                               for (const auto& [name, function] : module.functions) {
                                 if (function.is_kernel) names.push_back(name);
                               }
                               return names;
                             })
      .def(
          "run",
          [](const ptx::Module& module, const std::string& name, const std::vector<std::string>& arguments,
             uint32_t blocks, int warps, size_t shared, bool early, uint64_t order) {
            std::vector<ptx::Argument> given;
            for (const std::string& bytes : arguments) given.push_back({bytes.data(), bytes.size()});
            ptx::run(module, name, {blocks, warps, shared, early, order, 0}, given);
          },
          py::arg("name"), py::arg("arguments"), py::kw_only(), py::arg("blocks") = 1, py::arg("warps") = 1,
          py::arg("shared") = 0, py::arg("early") = false, py::arg("order") = 0,
          "Run the kernel whose name contains `name`, with the bytes of each argument. Addresses are the host's.");
  ptx_module.def(
      "counts",
      [] {
        py::dict all;
        for (const auto& [name, counts] : ptx::counts()) {
          py::dict accesses;
          for (const auto& [kind, found] : counts.accesses) {
            accesses[py::str(kind)] = py::make_tuple(found.requests, found.sectors, found.most);
          }
          py::dict one;
          one["launches"] = counts.launches;
          one["early"] = counts.early;
          one["blocks"] = counts.blocks;
          one["instructions"] = counts.instructions;
          one["accesses"] = accesses;
          all[py::str(name)] = one;
        }
        return all;
      },
      "What has run, by kernel; of accesses by full warps, (requests, 32-byte sectors, most sectors of one).");
  ptx_module.def("reset_counts", [] { ptx::counts().clear(); });
}

}  // namespace fusedopt
