"""benchmarks/host.py: the fit, and what it reads from callgrind_annotate."""

from __future__ import annotations

import pytest

from benchmarks.host import fit, parse_annotation

ANNOTATION = """\
Profile data file '/tmp/cg.out' (creator: callgrind-3.19.0)
Profiled target:  python -m benchmarks.host (PID 26419, part 1)
Events recorded:  Ir
8,700 (100.0%)  PROGRAM TOTALS
Ir                  file:function
4,000 (45.98%)  ???:void fusedopt::cpu::(anonymous namespace)::update_chunk<fusedopt::Adam, 0u, std::vector<int, \
std::allocator<int> > >(fusedopt::TensorRow const&, long) [clone .constprop.0] [fusedopt/_C.so]
2,000 (22.99%)  ???:fusedopt::plan::States::follow(_object*, _object*) [fusedopt/_C.so]
1,500 (17.24%)  /tmp/Python-3.11.7/Objects/dictobject.c:_PyDict_Next
  500 ( 5.75%)  /tmp/Python-3.11.7/./Include/object.h:_PyDict_Next [/usr/lib/libpython3.11.so.1.0]
  400 ( 4.60%)  ???:operator new(unsigned long) [/usr/lib/libstdc++.so.6]
  300 ( 3.45%)  ???:c10::TensorImpl::grad() const'2 [libc10.so]
"""


def test_fit() -> None:
    per_step, per_tensor = fit({count: 12.0 + 0.1 * count for count in (1, 50, 400, 1000)})
    assert per_step == pytest.approx(12.0)
    assert per_tensor == pytest.approx(0.1)


def test_fit_weighs_relative_errors() -> None:
    per_step, _ = fit({1: 10.1, 2: 10.2, 500: 50.0, 1000: 130.0})  # 10 + 0.1 * count, but for the large ones
    assert per_step == pytest.approx(10.0, rel=0.01)  # 6.3 if absolute errors counted


def test_parse_annotation() -> None:
    assert parse_annotation(ANNOTATION) == {
        "fusedopt::cpu::anonymous::update_chunk": 4000,
        "fusedopt::plan::States::follow": 2000,
        "_PyDict_Next": 2000,
        "operator new": 400,
        "c10::TensorImpl::grad": 300,
    }
