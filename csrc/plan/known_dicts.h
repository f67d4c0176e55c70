// Whether dicts are what they were when they were last read, without looking into them.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#define FUSEDOPT_DICT_VERSIONS (PY_VERSION_HEX < 0x030C0000)

namespace fusedopt::plan {

// Note [Dicts that have not changed]
// Until Python 3.11 every state of a dict has a number that no other state of any dict has, so a dict with the number
// that it had holds the very objects that it had. That is one cache line of each dict, at each step.
//
// From 3.12 on Python tells instead: it calls a function before a watched dict changes and before it is freed
// (PyDict_Watch). So the steps between two changes touch no dict at all. Python has eight such functions in all, of
// which others may have taken the last; then, and for whatever else is not watched, each dict is looked into.
//
// Reading a dict does not make an event, so this tells which objects a dict holds, and nothing of what they are.
class KnownDicts {
 public:
  KnownDicts() = default;
  ~KnownDicts() { reset(0); }
  KnownDicts(const KnownDicts&) = delete;
  KnownDicts& operator=(const KnownDicts&) = delete;

  // Forgets all dicts, and makes places for so many.
  void reset(size_t count);
  // Takes the dict at a place as it is now. To be called before it is read: reading may run Python, which may change
  // it.
  void know(size_t place, PyObject* dict);

  // For tests: whether dicts become known at all from now on. Without it each is looked into at each step.
  static void enable(bool on) { enabled_ = on; }

#if FUSEDOPT_DICT_VERSIONS
  // Whether the dict of a place is this one, and as it was.
  bool same(size_t place, PyObject* dict) const {
    return PyDict_Check(dict) && versions_[place] == reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }
  // To be called some time before same(), which then finds what it reads in the cache.
  [[gnu::always_inline]] static void prefetch(PyObject* dict) {
    __builtin_prefetch(&reinterpret_cast<PyDictObject*>(dict)->ma_version_tag);
  }
#else
  bool same(size_t place, PyObject* dict) const { return same_[place] == dict; }
  [[gnu::always_inline]] static void prefetch(PyObject* /*dict*/) {}

  // Python's call before a watched dict changes or is freed; see known_dicts.cpp.
  void changed(size_t place, bool freed);
#endif

 private:
  inline static bool enabled_ = true;

#if FUSEDOPT_DICT_VERSIONS
  std::vector<uint64_t> versions_;  // of each place, or 0 for one that is not known
#else
  void unwatch(size_t place);

  std::vector<PyObject*> same_;     // of each place, or null for one that is not known
  std::vector<PyObject*> watched_;  // whose changes are told, or null
#endif
};

}  // namespace fusedopt::plan
