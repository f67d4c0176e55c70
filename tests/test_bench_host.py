"""benchmarks/host.py: costs and lines, and what it reads from callgrind_annotate."""

from __future__ import annotations

import pytest

from benchmarks import dry
from benchmarks.host import COUNTS, host_costs, parse_annotation, time_table

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


def test_costs_are_what_a_step_takes_beyond_the_arithmetic() -> None:
    """As they come from a JSON file, whose keys are strings."""
    times = {"single": {"1": 3e-6, "400": 12e-6}, "one": {"1": 3e-6, "400": 52e-6}}
    arithmetic, costs = host_costs(times, "one")
    assert arithmetic == pytest.approx({1: 0.0, 400: 9e-6})
    assert costs == pytest.approx({1: 3e-6, 400: 43e-6})


def test_the_table_quotes_a_line_where_one_holds() -> None:
    single = {str(count): 3e-6 + 1e-8 * count for count in COUNTS}
    step = {str(count): 4e-6 + 1e-7 * count + 1e-8 * (count - 1) for count in COUNTS}
    text = time_table({"times": {"bare": {"single": single, "one": step, "each": step}}})
    assert "| bare | one    | 48.0      | 4.0" in text
    assert "- bare, a group for each: 4 µs + 100 ns per tensor, from 1 to 1,000 tensors, within 0%" in text


def test_parse_annotation() -> None:
    assert parse_annotation(ANNOTATION) == {
        "fusedopt::cpu::anonymous::update_chunk": 4000,
        "fusedopt::plan::States::follow": 2000,
        "_PyDict_Next": 2000,
        "operator new": 400,
        "c10::TensorImpl::grad": 300,
    }


def test_parse_annotation_of_several_columns() -> None:
    text = """\
DLmr              DLmw              file:function
160,000 (15.1%)   1,500 (40.0%)     ???:fusedopt::plan::States::look(unsigned long) const [fusedopt/_C.so]
 20,000 ( 5.1%)   .                 ???:c10::StorageImpl::mutable_data() [libc10.so]
.                 70 ( 2.0%)        ???:memset [libc.so]
"""
    assert parse_annotation(text) == {
        "fusedopt::plan::States::look": 161_500,
        "c10::StorageImpl::mutable_data": 20_000,
        "memset": 70,
    }


def test_the_host_path_on_a_gpu_has_a_column_for_each_python() -> None:
    def run(*seconds: float) -> dict[str, object]:
        steps = [{"count": 400, "groups": groups, "recipe": "bare"} for groups in ("one", "each")]
        return {"steps": [{**step, "seconds": each} for step, each in zip(steps, seconds, strict=False)]}

    lines = dry.table({"3.11": run(1e-4, 2e-4), "3.13": run(8e-5)}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][4:-1] == [
        "ns per tensor, Python 3.11",
        "ns per tensor, Python 3.13",
    ]
    assert [[cell.strip() for cell in line.split("|")][2:-1] for line in lines[2:]] == [
        ["one", "bare", "250", "200"],
        ["each", "bare", "500", ""],
    ]
