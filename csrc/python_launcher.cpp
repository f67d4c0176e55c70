#include "python_launcher.h"

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace fusedopt {
namespace {

// As Triton takes it: addresses of some devices are beyond 2^63, and negative then.
int64_t address(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

// Note [Uploads from Python]
// What has changed in the tables is copied to pinned memory and from there to the device, ordered with the stream;
// torch's allocator does not give that memory to anyone else until the copy is through. A captured copy reads it at
// every replay, so a capture keeps its memory for as long as there is the plan. Pinned memory cannot be had from the
// driver during a capture (of older torch): outside of one, each step leaves enough for two captures, which take it
// with them.
struct Uploads {
  py::object is_capturing;
  c10::DeviceType type;
  int64_t largest = 0;  // of the uploads so far
  std::vector<at::Tensor> spare, captured;

  static at::Tensor pinned(int64_t bytes) {
    return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  }

  bool capturing(const device::Place& place) {
    const bool now = is_capturing(place.device).cast<bool>();
    if (now || !largest) return now;
    if (!spare.empty() && spare[0].numel() < largest) spare.clear();
    while (spare.size() < 2) spare.push_back(pinned(largest));
    return now;
  }

  void upload(const device::Place& place, void* to, const void* from, size_t bytes) {
    if (type == at::kCPU) {
      std::memcpy(to, from, bytes);
      return;
    }
    const auto size = static_cast<int64_t>(bytes);
    largest = std::max(largest, size);
    at::Tensor staging;
    if (capturing(place)) {
      if (spare.empty() || spare.back().numel() < size) {
        staging = pinned(size);
      } else {
        staging = spare.back().narrow(0, 0, size);
        spare.pop_back();
      }
      captured.push_back(staging);
    } else {
      staging = pinned(size);
    }
    std::memcpy(staging.mutable_data_ptr(), from, bytes);
    const at::Device device(type, static_cast<c10::DeviceIndex>(place.device));
    at::for_blob(to, {size})
        .options(at::TensorOptions().dtype(at::kByte).device(device))
        .target_device(device)
        .make_tensor()
        .copy_(staging, /*non_blocking=*/true);
  }
};

}  // namespace

device::Launcher python_launcher(const py::object& object, c10::DeviceType type) {
  using device::Place;
  auto method = [&](const char* name) { return py::object(object.attr(name)); };
  device::Launcher launcher;
  const auto uploads = std::make_shared<Uploads>(Uploads{method("capturing"), type, 0, {}, {}});
  launcher.capturing = [uploads](const Place& place) { return uploads->capturing(place); };
  launcher.upload = [uploads](const Place& place, void* to, const void* from, size_t bytes) {
    uploads->upload(place, to, from, bytes);
  };
  launcher.map_chunks = [call = method("map_chunks")](const Place&, const device::Tables& tables) { call(&tables); };
  launcher.statistics = [call = method("statistics")](const Place& place, const device::StatisticsArguments& a) {
    call(place.device, &a);
  };
  launcher.conclude = [call = method("conclude")](const Place&, const device::StatisticsArguments& a,
                                                  const double* totals,
                                                  int count) { call(&a, address(totals), count); };
  // The number of each column's dtype, or -1 for one that is not there; and whether something is rounded by chance.
  auto dtypes_of = [](const device::Row& like) {
    py::tuple dtypes(device::kColumns + 1);
    dtypes[device::kColumns] = static_cast<int>(like.by_chance);
    for (int c = 0; c < device::kColumns; ++c) {
      dtypes[static_cast<size_t>(c)] = like.data[c] || c == device::kGrad ? static_cast<int>(like.dtype[c]) : -1;
    }
    return dtypes;
  };
  launcher.load = [call = method("load"), dtypes_of](const Place& place, const device::UpdateArguments& a,
                                                     const device::Row& like) {
    call(place.device, &a, dtypes_of(like));
  };
  launcher.update = [call = method("update"), dtypes_of](const Place& place, const device::UpdateArguments& a,
                                                         const device::Row& like,
                                                         bool) { call(place.device, &a, dtypes_of(like)); };
  launcher.partials = 2;
  launcher.prepares_bare = true;
  launcher.per_dtypes = true;
  return launcher;
}

void define_launching(py::module_& m) {
  using namespace device;
  const py::module_ e = m.def_submodule("launching", "What the methods of a launcher in Python are given.");
#define FUSEDOPT_ADDRESS(Class, field) \
  def_property_readonly(#field, [](const Class& self) { return address(self.field); })
  py::class_<Tables>(e, "Tables", "Addresses of the tables on a device, and their sizes; see csrc/device/tables.h.")
      .FUSEDOPT_ADDRESS(Tables, groups)
      .FUSEDOPT_ADDRESS(Tables, grads)
      .FUSEDOPT_ADDRESS(Tables, rows)
      .FUSEDOPT_ADDRESS(Tables, layouts)
      .FUSEDOPT_ADDRESS(Tables, chunks)
      .FUSEDOPT_ADDRESS(Tables, scalars)
      .FUSEDOPT_ADDRESS(Tables, partials)
      .FUSEDOPT_ADDRESS(Tables, control)
      .def_readonly("row_count", &Tables::row_count)
      .def_readonly("chunk_count", &Tables::chunk_count)
      .def_readonly("chunk_elements", &Tables::chunk_elements);
  py::class_<Operand>(e, "Operand", "A number, or the address and dtype of one on the device.")
      .def_readonly("value", &Operand::value)
      .FUSEDOPT_ADDRESS(Operand, live)
      .def_property_readonly("dtype", [](const Operand& self) { return static_cast<int>(self.dtype); });
  py::class_<Report>(e, "Report", "Where a step leaves what it found out; 0 where nobody asked.")
      .FUSEDOPT_ADDRESS(Report, scalars)
      .FUSEDOPT_ADDRESS(Report, found_inf)
      .def_readonly("scalars_are_double", &Report::scalars_are_double);
  py::class_<AverageSettings>(e, "AverageSettings", "How the average of the weights is kept; see csrc/tables.h.")
      .def_readonly("momentum", &AverageSettings::momentum)
      .def_readonly("gamma", &AverageSettings::gamma)
      .def_readonly("begin", &AverageSettings::begin)
      .def_readonly("interval", &AverageSettings::interval);
  py::class_<StatisticsArguments>(e, "StatisticsArguments")
      .def_readonly("tables", &StatisticsArguments::tables)
      .def_property_readonly("kind", [](const StatisticsArguments& self) { return static_cast<int>(self.norm.kind); })
      .def_property_readonly("p", [](const StatisticsArguments& self) { return self.norm.p; })
      .def_readonly("check", &StatisticsArguments::check)
      .def_readonly("has_found_inf", &StatisticsArguments::has_found_inf)
      .def_readonly("refuse_nonfinite", &StatisticsArguments::refuse_nonfinite)
      .def_readonly("scale", &StatisticsArguments::scale)
      .def_readonly("found_inf", &StatisticsArguments::found_inf)
      .def_readonly("max_norm", &StatisticsArguments::max_norm)
      .def_readonly("report", &StatisticsArguments::report)
      .def_readonly("average", &StatisticsArguments::average)
      .def_readonly("domains", &StatisticsArguments::domains)
      .FUSEDOPT_ADDRESS(StatisticsArguments, totals);
  py::class_<UpdateArguments>(e, "UpdateArguments")
      .def_readonly("tables", &UpdateArguments::tables)
      .def_readonly("reverse", &UpdateArguments::reverse)
      .def_readonly("write_back", &UpdateArguments::write_back)
      .def_readonly("clip_value", &UpdateArguments::clip_value)
      .def_property_readonly("seed", [](const UpdateArguments& self) { return static_cast<int64_t>(self.seed); })
      .def_readonly("first_chunk", &UpdateArguments::first_chunk)
      .def_readonly("chunk_count", &UpdateArguments::chunk_count);
#undef FUSEDOPT_ADDRESS

  // Bytes, by "Struct" for a size and "Struct.field" for an offset.
  py::dict layout;
#define FUSEDOPT_FIELD(Struct, field) layout[#Struct "." #field] = offsetof(Struct, field)
  layout["GroupRow"] = sizeof(GroupRow);
  FUSEDOPT_FIELD(GroupRow, value);
  FUSEDOPT_FIELD(GroupRow, live);
  FUSEDOPT_FIELD(GroupRow, live_dtype);
  layout["Row"] = sizeof(Row);
  FUSEDOPT_FIELD(Row, data);
  FUSEDOPT_FIELD(Row, step);
  FUSEDOPT_FIELD(Row, numel);
  FUSEDOPT_FIELD(Row, layout);
  FUSEDOPT_FIELD(Row, group);
  FUSEDOPT_FIELD(Row, first_chunk);
  FUSEDOPT_FIELD(Row, domain);
  FUSEDOPT_FIELD(Row, dtype);
  FUSEDOPT_FIELD(Row, step_dtype);
  FUSEDOPT_FIELD(Row, by_chance);
  FUSEDOPT_FIELD(Row, stream);
  FUSEDOPT_FIELD(Row, numbers);
  FUSEDOPT_FIELD(Row, first_number);
  layout["ChunkEntry"] = sizeof(ChunkEntry);
  FUSEDOPT_FIELD(ChunkEntry, row);
  FUSEDOPT_FIELD(ChunkEntry, index);
  layout["RowScalars"] = sizeof(RowScalars);
  FUSEDOPT_FIELD(RowScalars, values);
  FUSEDOPT_FIELD(RowScalars, average_weight);
  FUSEDOPT_FIELD(RowScalars, variant);
  FUSEDOPT_FIELD(RowScalars, step);
  FUSEDOPT_FIELD(Control, multiplier);
  FUSEDOPT_FIELD(Control, skip);
  layout["Layout"] = sizeof(Layout);
  FUSEDOPT_FIELD(Layout, dims);
  FUSEDOPT_FIELD(Layout, size);
  FUSEDOPT_FIELD(Layout, stride);
#undef FUSEDOPT_FIELD
  e.attr("TABLE_LAYOUT") = layout;
}

}  // namespace fusedopt
