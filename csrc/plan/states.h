// The states of the parameters: found in the optimizer's dicts once, and followed there from step to step.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "../rule_interface.h"
#include "groups.h"
#include "known_dicts.h"
#include "precision.h"
#include "rows.h"
#include "target.h"

namespace fusedopt::plan {

// The problem that creating the state mends; compared by address.
inline constexpr char kNoState[] = "has no state yet";

// Step counts are in the state dicts, or, where the optimizer hides them, in a dict of their own: by parameter, a tuple
// (count, weak reference to the first column that it counts the steps of). See fusedopt/rules/counts.py. `counts` is
// that dict, or null.
class States {
 public:
  States(const RuleInterface& rule, const Target& target, const Precision& precision)
      : rule_(rule), target_(target), precision_(precision) {}

  // Nothing is known any more of where the states are.
  void forget() { known_ = false; }
  // Whether look() may be called: the states were found in these very dicts. `rows` may have others by now.
  bool can_look(PyObject* state, PyObject* counts, const Rows& rows) const;
  // Brings the state of some rows up to date, in any thread: see Note [Rows in threads]. Returns false when some state
  // is no longer as it was found.
  bool look(size_t begin, size_t end, Rows& rows) const;
  // Brings the columns of states and the step counts of all rows up to date. `looked` is what look() said of all.
  void refresh(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows, Problems& problems, bool looked);

 private:
  // Names of the step count and of the columns in a state dict, null for one that is not there, and their positions.
  struct Keys {
    py::object name[1 + kKeys];
    Py_ssize_t position[1 + kKeys];
    int first;  // of the columns that are there, which a hidden count counts the steps of

    bool operator==(const Keys& other) const;
  };
  // Where the optimizer's state has the state dict of one row.
  struct Entry {
    Py_ssize_t position;
    uint32_t keys;              // row of keys_
    Py_ssize_t count_position;  // in the dict of hidden counts
    PyObject* counted;          // the weak reference there
  };
  // What a state dict has for one row.
  struct Found {
    Keys keys{};
    PyObject* objects[1 + kKeys] = {};  // the step count and the columns
    at::Tensor step, columns[kKeys];
  };
  // By parameter: the position in the dict of hidden counts, and the pair there.
  using HiddenCounts = std::unordered_map<PyObject*, std::pair<Py_ssize_t, PyObject*>>;
  // Places in dicts_: of the optimizer's state, of hidden counts, and of the state dict of the first row.
  static constexpr size_t kState = 0, kCounts = 1, kFirst = 2;

  void prefetch_states(size_t r, const Rows& rows) const;
  template <class LocalOf>
  bool take_data(size_t r, Rows& rows, const LocalOf& local_of) const;
  bool follow(PyObject* state, PyObject* counts, Rows& rows);
  bool follow_dict(size_t r, Rows& rows);
  bool follow_count(PyObject* counts, size_t r, Rows& rows);
  unsigned needed(const Groups& groups, const Rows& rows, size_t r) const;
  void find(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows);
  const char* find_row(size_t r, unsigned columns, const HiddenCounts* counts, Rows& rows);
  Found look_into(PyObject* dict, unsigned columns, bool has_step) const;
  const char* find_hidden_count(const HiddenCounts& counts, PyObject* param, Entry& entry, Found& found) const;
  const char* take_count(const at::Tensor& step, size_t r, Rows& rows) const;
  const char* take_columns(const Found& found, unsigned columns, size_t r, Rows& rows) const;
  const char* take_column(const Found& found, int c, size_t r, Rows& rows) const;

  const RuleInterface& rule_;
  const Target target_;
  const Precision& precision_;
  std::vector<PyObject*> state_dicts_;  // of each row, or null
  std::vector<Entry> entries_;          // of each row
  std::vector<Keys> keys_;              // one per distinct layout of a state dict
  KnownDicts dicts_;
  bool known_ = false;       // of the parameters there are
  bool incomplete_ = false;  // some row has a state_problem
};

}  // namespace fusedopt::plan
