// The Python module fusedopt._C.
#include <pybind11/stl.h>

#include <limits>
#include <optional>

#include "cpu/executor.h"
#include "cuda/device.h"
#include "device/executor.h"
#if defined(FUSEDOPT_EMULATOR)
#include "cuda/emulator/control.h"
#include "ptx/bindings.h"
#endif
#include "plan/plan.h"
#include "probe.h"
#include "python_launcher.h"
#include "scaler.h"
#include "storage.h"

namespace fusedopt {
namespace {

// Read from the file's bytes by fusedopt.backends.binding, before the module is loaded.
[[gnu::used]] const char kStamp[] =
    "fusedopt built for torch " FUSEDOPT_TORCH_VERSION "; C++11 ABI " FUSEDOPT_CXX11_ABI ";";

py::object run_step(StepPlan& plan, const py::object& param_groups, const py::dict& state, const py::object& grad_scale,
                    const py::object& found_inf, bool check, double norm_type, const py::object& max_norm,
                    bool error_if_nonfinite, double clip_value, bool write_back, const std::optional<py::dict>& counts,
                    bool half, bool agreed) {
  StepSettings settings;
  if (!grad_scale.is_none()) settings.scale = plan.number(grad_scale);
  settings.has_found_inf = !found_inf.is_none();
  if (settings.has_found_inf) settings.found_inf = plan.number(found_inf);
  settings.check = check;
  if (norm_type > 0) {
    settings.norm.p = norm_type;
    settings.norm.kind = norm_type == 1                                         ? NormKind::kOne
                         : norm_type == 2                                       ? NormKind::kTwo
                         : norm_type == std::numeric_limits<double>::infinity() ? NormKind::kInf
                                                                                : NormKind::kP;
    settings.max_norm = plan.number(max_norm);
  }
  settings.error_if_nonfinite = error_if_nonfinite;
  settings.clip_value = clip_value;
  settings.write_back = write_back;
  return plan.step(param_groups, state, counts ? py::object(*counts) : py::none(), settings, half, agreed);
}

py::object finish_step(StepPlan& plan, const py::object& pairs) {
  if (!THPVariable_Check(pairs.ptr())) throw py::type_error("pairs must be a tensor");
  return plan.finish(THPVariable_Unpack(pairs.ptr()));
}

bool update_scale_of(const py::object& scale, const py::object& growth_tracker, const py::object& found_inf,
                     double growth_factor, double backoff_factor, int64_t growth_interval) {
  for (const py::object* tensor : {&scale, &growth_tracker, &found_inf}) {
    if (!THPVariable_Check(tensor->ptr())) return false;
  }
  return update_scale(THPVariable_Unpack(scale.ptr()), THPVariable_Unpack(growth_tracker.ptr()),
                      THPVariable_Unpack(found_inf.ptr()), growth_factor, backoff_factor, growth_interval);
}

#if defined(FUSEDOPT_EMULATOR)
// See Note [Emulation].
void define_emulator(py::module_& m) {
  namespace emulated = cuda::emulated;
  py::module_ e = m.def_submodule("emulator", "The CUDA kernels as host code, for tests: StepPlan(rule, 'emulated').");
  py::class_<emulated::Graph, std::shared_ptr<emulated::Graph>>(e, "Graph", "Recorded launches.")
      .def("replay", &emulated::Graph::replay)
      .def("__len__", [](const emulated::Graph& graph) { return graph.launches.size(); });
  e.def("begin_capture", &emulated::begin_capture, "Record launches from now on instead of running them.");
  e.def("end_capture", &emulated::end_capture, "Stop recording; returns the Graph.");
  e.def("launch_count", &emulated::launch_count, "Launches so far, uploads of tables included.");
  e.def(
      "configure",
      [](uint64_t order, bool slow_double, bool dry, uint32_t lost) {
        emulated::settings() = {order, slow_double, dry, lost, std::move(emulated::settings().ptx)};
      },
      py::arg("order") = 0, py::arg("slow_double") = false, py::arg("dry") = false, py::arg("lost") = 0,
      "Run blocks and threads in another order (a seed), as on a GPU with slow double arithmetic, or not at all; leave "
      "out the last blocks of each launch of more.");
  e.def(
      "use_ptx",
      [](const std::vector<std::shared_ptr<ptx::Module>>& modules) {
        emulated::settings().ptx.assign(modules.begin(), modules.end());
      },
      py::arg("modules"), "Run this PTX of the kernels from now on; with an empty list, the host code.");
}
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = FUSEDOPT_TORCH_VERSION;
  info["compiler"] = FUSEDOPT_COMPILER;
  info["build_type"] = FUSEDOPT_BUILD_TYPE;
  info["cuda"] = cuda::built_with();
  info["cuda_archs"] = cuda::architectures();
  return info;
}

}  // namespace
}  // namespace fusedopt

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;
  m.doc() = "Compiled kernels of fusedopt.";

  py::class_<StepPlan>(m, "StepPlan", "Tables of one optimizer's tensors; fusedopt.backends.NativeBackend drives it.")
      .def(py::init<const std::string&, const std::string&, int, const py::object&, const py::object&,
                    const py::object&>(),
           py::arg("rule"), py::arg("device") = "cpu", py::arg("emulated_devices") = 1,
           py::arg("launcher") = py::none(), py::arg("shards") = py::none(), py::arg("precision") = py::none())
      .def("step", &run_step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"), py::arg("found_inf"),
           py::arg("check"), py::arg("norm_type"), py::arg("max_norm"), py::arg("error_if_nonfinite"),
           py::arg("clip_value"), py::arg("write_back"), py::arg("counts") = py::none(), py::arg("half") = false,
           py::arg("agreed") = false)
      .def("finish", &finish_step, py::arg("pairs"))
      .def("abandon", &StepPlan::abandon)
      .def_property_readonly("counts_integers", &StepPlan::counts_integers)
      .def("take_foreign_numbers", &StepPlan::take_foreign_numbers)
      .def_property_readonly("row_count", &StepPlan::row_count)
      .def_property_readonly("chunk_count", &StepPlan::chunk_count);

  m.def("update_scale", &update_scale_of, py::arg("scale"), py::arg("growth_tracker"), py::arg("found_inf"),
        py::arg("growth_factor"), py::arg("backoff_factor"), py::arg("growth_interval"),
        "torch._amp_update_scale_ for tensors on the CPU; False, with nothing done, for others.");
  m.def("probe", &probe, py::arg("tensor"), py::arg("follow"),
        "What the module reads of a tensor, to be compared with what torch says; `follow` counts its version up.");
  m.def("build_info", &build_info, "What the module was built with: torch, compiler, build_type, cuda (None without).");
  m.def("rule_names", &rule_names, "Rules that have kernels.");
  m.def("cpu_isas", &cpu::available_isas, "CPU instruction sets of this build that this processor has, best last.");
  m.def("cpu_isa", &cpu::isa_in_use, "The CPU instruction set in use.");
  m.def("use_cpu_isa", &cpu::use_isa, py::arg("name"), "Use another CPU instruction set, for tests.");
  m.def("know_dicts", &plan::KnownDicts::enable, py::arg("on"),
        "Whether dicts that Python says have not changed are not looked into, for tests of the other way.");
  m.def("cuda_problem", &cuda::problem, "Why CUDA cannot be used, or None.");
  m.def("cuda_problem_on", &cuda::problem_on, py::arg("device"), "Why the kernels cannot run on this GPU, or None.");
  m.def("device_chunk_elements", &device::chunk_elements, py::arg("total"), "Elements of a chunk, of so many in all.");
  m.def("has_slow_double", &device::has_slow_double, py::arg("capability"),
        "Whether NVIDIA's GPUs of a compute capability, such as 86, add norms up in float first.");
  define_launching(m);
#if defined(FUSEDOPT_EMULATOR)
  define_ptx(m);
  define_emulator(m);
#endif
  m.attr("TENSOR_OBJECT_BYTES") = tensor_object_bytes();
  m.attr("CLIP_EPS") = kClipEps;
  m.attr("RANDOM") = py::make_tuple(kRandomRounds, kRandomColumns);
  m.attr("CODES") = py::make_tuple(kCodeBlock, py::make_tuple(SignedCode::kMantissa, SignedCode::kMost),
                                   py::make_tuple(UnsignedCode::kMantissa, UnsignedCode::kMost));
  m.attr("CPU_CHUNK_ELEMENTS") = cpu::kChunkElements;
}
