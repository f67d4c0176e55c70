"""The forms of columns with which Triton's update kernels are tried: each rule, with each number of its states."""

from __future__ import annotations

from fusedopt.backends import TritonBackend
from fusedopt.rules import Rule

F32, F64, BF16, F16, ROOT16, SIGNED8, UNSIGNED8, LOW16, LOW8, ABSENT = 0, 1, 2, 3, 4, 5, 6, 7, 8, -1
#: Of parameter, gradient and three states; a rule takes as many as it has.
MIXED = [(BF16, BF16, F32, F32, F32), (F32, F16, F32, BF16, F32), (F64, BF16, F16, BF16, F16)]

#: Of parameter, gradient, states (the first is no root), master and average, and whether chance rounds.
KEPT = [
    (F32, F32, SIGNED8, UNSIGNED8, UNSIGNED8, ABSENT, ABSENT, 0),
    (F32, F32, F16, ROOT16, ROOT16, ABSENT, F32, 1),
    (BF16, BF16, BF16, BF16, BF16, ABSENT, ABSENT, 1),
    (BF16, BF16, F32, F32, F32, LOW16, ABSENT, 1),
    (BF16, BF16, SIGNED8, UNSIGNED8, UNSIGNED8, LOW8, F32, 1),
    (F16, F32, BF16, BF16, BF16, F32, ABSENT, 0),
    (F64, F64, SIGNED8, UNSIGNED8, ABSENT, ABSENT, ABSENT, 1),
]


def state_counts(rule: Rule) -> list[int]:
    """The numbers of states that the rule may keep for a parameter."""
    return sorted({len(rule.needed_columns(settings)) for settings in rule.trial_settings()})


def dtypes_of_columns(rule: Rule) -> list[tuple[int, ...]]:
    """All columns of each dtype, for each number of states, and mixtures in turns; none for a rule without kernels.

    As the plan tells a launcher: seven columns and whether something is rounded by chance.
    """
    if TritonBackend.unavailable_for(rule) is not None:
        return []
    counts = state_counts(rule)
    columns = [((dtype,) * 5, count) for count in counts for dtype in (F32, F64, BF16, F16)]
    columns += [(mixture, counts[i % len(counts)]) for i, mixture in enumerate(MIXED)]
    plain = [dtypes[: 2 + count] + (ABSENT,) * (3 - count + 2) + (0,) for dtypes, count in columns]
    return list(dict.fromkeys(plain)) + kept_columns(rule)


def kept_columns(rule: Rule) -> list[tuple[int, ...]]:
    """Columns in few bits and what is carried beside them, with the most states that the rule has."""
    count = state_counts(rule)[-1]
    return [dtypes[: 2 + count] + (ABSENT,) * (3 - count) + dtypes[5:] for dtypes in KEPT]
