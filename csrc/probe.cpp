#include "probe.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plan/local.h"
#include "tensors.h"

namespace fusedopt {
namespace {

py::tuple tuple_of(at::IntArrayRef numbers) {
  py::tuple tuple(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) tuple[i] = numbers[i];
  return tuple;
}

py::object dtype_of(const c10::TensorImpl* impl) {
  DType dtype;
  if (!to_dtype(impl, dtype)) return py::none();
  switch (dtype) {
    case DType::kFloat32:
      return py::str("float32");
    case DType::kFloat64:
      return py::str("float64");
    case DType::kBFloat16:
      return py::str("bfloat16");
    case DType::kFloat16:
      return py::str("float16");
    default:  // no dtype of torch's
      break;
  }
  return py::none();
}

uintptr_t address_of(c10::TensorImpl* impl) { return reinterpret_cast<uintptr_t>(data_of(impl)); }

}  // namespace

size_t tensor_object_bytes() { return sizeof(THPVariable); }

py::dict probe(const py::object& object, bool follow) {
  if (!THPVariable_Check(object.ptr())) throw py::type_error("expected a tensor");
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  py::dict read;
  read["dims"] = impl->dim();
  read["numel"] = impl->numel();
  read["sizes"] = tuple_of(impl->sizes());
  read["strides"] = tuple_of(impl->strides());
  read["storage_offset"] = impl->storage_offset();
  read["contiguous"] = impl->is_contiguous();
  read["dtype"] = dtype_of(impl);
  read["itemsize"] = impl->itemsize();
  read["cpu"] = impl->device().is_cpu();
  read["plain"] = !unreachable(impl, at::kCPU);
  read["subclass"] = impl->is_python_dispatch();
  read["inference"] = impl->is_inference();
  if (!follow) return read;
  read["data"] = address_of(impl);
  read["storage_bytes"] = impl->unsafe_storage().nbytes();
  read["version"] = impl->version_counter().current_version();
  impl->bump_version();
  const at::Tensor& grad = impl->grad();
  read["grad"] = grad.defined() ? py::object(py::int_(address_of(grad.unsafeGetTensorImpl()))) : py::none();
  read["same_object"] = plan::object_of(tensor) == object.ptr();
  read["threads"] = at::get_num_threads();
  return read;
}

}  // namespace fusedopt
