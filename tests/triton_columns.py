"""The dtypes of columns with which Triton's update kernels are tried: each rule, with each number of its states."""

from __future__ import annotations

from fusedopt.backends import TritonBackend
from fusedopt.rules import Rule

F32, F64, BF16, F16, ABSENT = 0, 1, 2, 3, -1
#: Of parameter, gradient and three states; a rule takes as many as it has.
MIXED = [(BF16, BF16, F32, F32, F32), (F32, F16, F32, BF16, F32), (F64, BF16, F16, BF16, F16)]


def state_counts(rule: Rule) -> list[int]:
    """The numbers of states that the rule may keep for a parameter."""
    return sorted({len(rule.needed_columns(settings)) for settings in rule.trial_settings()})


def dtypes_of_columns(rule: Rule) -> list[tuple[int, ...]]:
    """All columns of each dtype, for each number of states, and mixtures in turns; none for a rule without kernels."""
    if TritonBackend.unavailable_for(rule) is not None:
        return []
    counts = state_counts(rule)
    columns = [((dtype,) * 5, count) for count in counts for dtype in (F32, F64, BF16, F16)]
    columns += [(mixture, counts[i % len(counts)]) for i, mixture in enumerate(MIXED)]
    return list(dict.fromkeys(dtypes[: 2 + count] + (ABSENT,) * (3 - count) for dtypes, count in columns))
