// The parameter groups of an optimizer: hyperparameters, and which parameters there are.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

#include "../rule_interface.h"
#include "../step.h"
#include "known_dicts.h"
#include "rows.h"
#include "target.h"

namespace fusedopt::plan {

class Groups {
 public:
  Groups(const RuleInterface& rule, const Target& target) : rule_(rule), target_(target) {}

  // Whether the groups have the same keys and parameters as before. Reads hyperparameters that were replaced or may
  // have changed in place.
  bool unchanged(PyObject* param_groups, const Rows& rows);
  // Reads the groups from the beginning, and makes a row of each of their parameters.
  void read(PyObject* param_groups, Rows& rows);
  // After an error nothing is known of them: the next step reads them anew.
  void forget();

  // Whether hyperparameters were read since number().
  bool edited() const { return edited_; }
  // Gives equal sets of hyperparameters one row of the table: 400 groups are rarely 400 values. Returns false when a
  // group now needs other states than before.
  bool number(Rows& rows);

  // The distinct sets of hyperparameters, as TensorRow::group numbers them.
  const std::vector<const HyperValues*>& table() const { return table_; }
  // The states that the parameters of a group need, as bits.
  unsigned columns(uint32_t group) const { return groups_[group].columns; }
  // Whether hyperparameters were read since the last call that are numbers of another package than Python or torch.
  bool take_foreign_numbers() { return std::exchange(foreign_numbers_, false); }

 private:
  struct Entry {
    py::object key;
    py::object value;     // of a hyperparameter, else null
    Py_ssize_t position;  // in the group's dict
    int hyper_key;        // index into the rule's keys, or kParams
    bool live;            // may change without being replaced
  };
  static constexpr int kParams = -1;
  struct Group {
    std::vector<Entry> entries;
    HyperValues hyper;
    unsigned columns;
    uint32_t table_row;
    bool live;  // some entry is
    PyObject* params;
    size_t size;        // number of parameters
    const void* items;  // for prefetching only
  };

  void prefetch_group(size_t g, PyObject* dict) const;
  bool reread(Group& group, Py_ssize_t g, PyObject* dict, bool changed);
  void read_entries(Group& group, Py_ssize_t g, PyObject* dict);
  void read_value(Group& group, Py_ssize_t g, Entry& entry);
  bool read_number(PyObject* value, HyperValues& hyper, int slot);

  const RuleInterface& rule_;
  const Target target_;
  std::vector<Group> groups_;
  KnownDicts dicts_;  // of each group
  std::vector<const HyperValues*> table_;
  bool edited_ = true;
  bool foreign_numbers_ = false;
};

}  // namespace fusedopt::plan
