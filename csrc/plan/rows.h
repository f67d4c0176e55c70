// The parameters of a plan, a row each: the table that kernels read, and what tells whether it is still right.
#pragma once
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <string>
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

// What is read of a row's parameter and gradient at every step: one cache line.
struct alignas(64) HotRow {
  KnownTensor param, grad;
  const void* autograd;  // for prefetching only
  bool problem;          // the parameter cannot be served
  bool dtensor;          // `param`, `grad` and states are what of it lies in this process
  bool integer_count;    // the step count is an int64 tensor
};

// A tensor in a state dict.
struct KnownState {
  PyObject* object;  // or null where there is none
  KnownTensor tensor;
};

// What is read of a row's state at every step: two cache lines, of which the first is that of a rule with one column.
struct alignas(64) StateRow {
  KnownState step, column[kMaxStates];
};

static_assert(sizeof(HotRow) == 64 && sizeof(StateRow) == 128);

// What is needed of a row only when something has changed.
struct ColdRow {
  uint32_t group, index;      // of the parameter in it
  const char* problem;        // why the parameter cannot be served, or null
  const char* state_problem;  // the same of its state
  CanonicalOrder order;
  py::object spec;  // how a DTensor is dealt out, see spec_of()
  OwnedLayout param_layout, grad_layout, state_layout[kMaxStates];
};

// What a row carries beside what its rule knows of; there are none where all is as torch has it.
struct CarriedRow {
  Carried carried;  // which the row's TensorRow points to
  KnownState master, average;
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

// All rows, in the order of the groups. `table`, `objects`, `hot`, `states` and `cold` have one entry for each.
class Rows {
 public:
  // What looking at some rows has found.
  struct Seen {
    Participants participants;
    bool moved = false;            // a parameter has other memory
    std::vector<size_t> attended;  // rows to attend to

    void add(const Seen& other);
  };

  Rows(const Target& target, const Precision& precision) : target_(target), precision_(precision) {}

  size_t size() const { return table.size(); }
  void clear();
  void add(PyObject* param, uint32_t group, uint32_t index);
  // Cuts the rows into chunks; needed after rows were added.
  void build_chunks();

  // Brings parameters and gradients of some rows up to date that are as they were, and lists the others, in any thread:
  // see Note [Rows in threads].
  void look(size_t begin, size_t end, bool write_back, Seen& seen);
  // Brings the rows up to date that were listed, and notes what was seen of all. Returns false when a parameter is no
  // longer what it was, so that its state has to be found again.
  bool attend(Seen& seen, bool write_back, Problems& problems);
  // Whether rows were read anew since the last call, so that they may be in other domains.
  bool take_news() { return std::exchange(news_, false); }
  // Whether there are DTensors, whose parts only the first thread can look up.
  bool dealt_out() const { return dealt_out_; }

  // All that a step works on, so that no other thread frees it. To be made and dropped with the GIL.
  Held hold() const;
  // Counts up the versions of what a step has written, and where the CPU's kernels made it the step counts.
  void count_up(bool write_back, bool steps) const;

  std::vector<TensorRow> table;
  std::vector<uint32_t> domains;   // see Note [A step in two halves]
  std::vector<PyObject*> objects;  // the parameters, alive in their groups' lists during a step
  std::vector<HotRow> hot;
  std::vector<StateRow> states;
  std::vector<double> counts;  // of steps, where the CPU's kernels make them
  std::vector<ColdRow> cold;
  std::deque<CarriedRow> carried;  // of each row, or none; never moved
  std::vector<Chunk> chunks;
  Fingerprints prints;
  Participants participants;  // of this step
  bool overlaps = false;      // rows share memory: the update takes one after the other

 private:
  void prefetch_row(size_t r) const;
  void describe(size_t r);
  bool is_tensor(PyObject* object) const;
  bool refresh_param(size_t r, c10::TensorImpl* impl);
  bool refresh_grad(size_t r, c10::TensorImpl* impl);
  const char* attend_grad(size_t r, bool write_back);
  void note(size_t r, Participants& found) const;
  void find_overlaps();

  const Target target_;
  const Precision& precision_;
  py::object subclass_;  // of tensors: that of the last row which has one
  bool news_ = false, dealt_out_ = false;
};

// Where a parameter is, for messages.
std::string place_of(size_t group, size_t index);

// Calls `use` with the step count of a row in its own type.
template <class Use>
void with_count(const TensorRow& row, bool integer, Use use) {
  if (integer) {
    use(*static_cast<int64_t*>(row.step));
  } else if (row.step_dtype == DType::kFloat64) {
    use(*static_cast<double*>(row.step));
  } else {
    use(*static_cast<float*>(row.step));
  }
}

}  // namespace fusedopt::plan
