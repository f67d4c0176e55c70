// The parameters of a plan, a row each: the table that kernels read, and what tells whether it is still right.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <utility>
#include <vector>

#include "columns.h"
#include "fingerprint.h"
#include "precision.h"
#include "target.h"

namespace fusedopt::plan {

// Why a parameter with a gradient cannot be stepped.
struct Problem {
  size_t row;
  const char* text;
};
using Problems = std::vector<Problem>;

// What is read of a row at every step, kept small: with cold caches a step of many small tensors costs what it touches.
struct HotRow {
  PyObject* object;  // the parameter, alive in its group's list during a step
  uint32_t group, index;
  bool integer_count;  // the step count is an int64 tensor
  bool dtensor;        // `param`, `grad` and states are what of it lies in this process
  KnownTensor param, grad, step, state[kMaxStates];
  const void* autograd;       // for prefetching only
  const char* problem;        // why the parameter cannot be served, or null
  const char* state_problem;  // the same of its state
};

// What is needed of a row only when something has changed.
struct ColdRow {
  CanonicalOrder order;
  py::object spec;  // how a DTensor is dealt out, see spec_of()
  OwnedLayout param_layout, grad_layout, state_layout[kMaxStates];
};

// What a row carries beside what its rule knows of; there are none where all is as torch has it.
struct CarriedRow {
  Carried carried;  // which the row's TensorRow points to
  KnownTensor master, average;
  OwnedLayout master_layout, average_layout, numbers;
};

// What takes part in one step: the parameters that have a gradient.
struct Participants {
  int64_t elements = 0;
  bool any = false;
  bool any_double = false;  // a parameter is in float64, with a gradient or without
};

// The parameters as objects, of everything else its memory: to hold a tensor that has an object of Python costs more
// than a small step's update of it.
struct Held {
  std::vector<py::object> objects;
  std::vector<c10::Storage> storages;
};

// All rows, in the order of the groups. `table`, `hot` and `cold` have one entry for each.
class Rows {
 public:
  Rows(const Target& target, const Precision& precision) : target_(target), precision_(precision) {}

  size_t size() const { return table.size(); }
  void clear();
  void add(PyObject* param, uint32_t group, uint32_t index);
  // Cuts the rows into chunks; needed after rows were added.
  void build_chunks();

  // Brings parameters and gradients up to date and counts who takes part. Returns false when a parameter is no longer
  // what it was, so that its state has to be found again.
  bool refresh(bool write_back, Problems& problems);
  // Whether rows were read anew since the last call, so that they may be in other domains.
  bool take_news() { return std::exchange(news_, false); }

  // All that a step works on, so that no other thread frees it. To be made and dropped with the GIL.
  Held hold() const;
  // Counts up the versions of what a step has written.
  void bump_versions(bool write_back) const;

  std::vector<TensorRow> table;
  std::vector<uint32_t> domains;  // see Note [A step in two halves]
  std::vector<HotRow> hot;
  std::vector<ColdRow> cold;
  std::deque<CarriedRow> carried;  // of each row, or none; never moved
  std::vector<Chunk> chunks;
  Participants participants;  // of this step
  bool overlaps = false;      // rows share memory: the update takes one after the other

 private:
  void prefetch_row(size_t r) const;
  void describe(size_t r);
  bool refresh_param(size_t r);
  const char* refresh_grad(size_t r, bool write_back);
  void find_overlaps();

  const Target target_;
  const Precision& precision_;
  bool news_ = false;
};

}  // namespace fusedopt::plan
