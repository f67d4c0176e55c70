#include "known_dicts.h"

#include <algorithm>
#include <unordered_map>

namespace fusedopt::plan {

#if FUSEDOPT_DICT_VERSIONS

void KnownDicts::reset(size_t count) { versions_.assign(count, 0); }

void KnownDicts::know(size_t place, PyObject* dict) {
  versions_[place] = enabled_ ? reinterpret_cast<PyDictObject*>(dict)->ma_version_tag : 0;
}

#else

namespace {

// Where a watched dict is known. Several plans may know one: an optimizer's groups may be shared with another.
struct Place {
  KnownDicts* owner;
  size_t place;
};

// Touched with the GIL only. Never destroyed: dicts, and plans that Python leaves behind, outlive static objects.
std::unordered_multimap<PyObject*, Place>& places() {
  static auto* const all = new std::unordered_multimap<PyObject*, Place>;
  return *all;
}

int tell(PyDict_WatchEvent event, PyObject* dict, PyObject* /*key*/, PyObject* /*value*/) {
  const bool freed = event == PyDict_EVENT_DEALLOCATED;
  const auto [begin, end] = places().equal_range(dict);
  for (auto each = begin; each != end; ++each) each->second.owner->changed(each->second.place, freed);
  if (freed) places().erase(begin, end);
  return 0;
}

bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

// Python's number of tell(), or -1. It is of one interpreter, and torch lives in the first.
int watcher() {
  static const int number = [] {
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) return -1;
    const int added = PyDict_AddWatcher(&tell);
    if (added < 0) PyErr_Clear();
    return added;
  }();
  return number;
}

}  // namespace

void KnownDicts::changed(size_t place, bool freed) {
  same_[place] = nullptr;
  if (freed) watched_[place] = nullptr;
}

void KnownDicts::unwatch(size_t place) {
  PyObject* const dict = watched_[place];
  watched_[place] = nullptr;
  if (!dict) return;
  auto [begin, end] = places().equal_range(dict);
  const bool others = std::distance(begin, end) > 1;
  const auto mine = std::find_if(
      begin, end, [&](const auto& each) { return each.second.owner == this && each.second.place == place; });
  if (mine != end) places().erase(mine);
  // Late in the end of the interpreter Python no longer tells, so the dict may be gone.
  if (others || finalizing()) return;
  if (PyDict_Unwatch(watcher(), dict) < 0) PyErr_Clear();
}

void KnownDicts::reset(size_t count) {
  for (size_t place = 0; place < watched_.size(); ++place) unwatch(place);
  same_.assign(count, nullptr);
  watched_.assign(count, nullptr);
}

void KnownDicts::know(size_t place, PyObject* dict) {
  same_[place] = nullptr;
  if (!enabled_) return;
  if (watched_[place] != dict) {
    unwatch(place);
    if (watcher() < 0) return;
    if (PyDict_Watch(watcher(), dict) < 0) return PyErr_Clear();
    places().emplace(dict, Place{this, place});
    watched_[place] = dict;
  }
  same_[place] = dict;
}

#endif

}  // namespace fusedopt::plan
