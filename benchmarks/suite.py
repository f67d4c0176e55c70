"""Which cases the suite runs, and with whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fusedopt.bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS, Case
from fusedopt.bench.contenders import OURS, RIVAL

from .in_backward import IN_BACKWARD

# The large cases leave the slow ones out: they would take most of the time, and are an order away.
FAST = (OURS, RIVAL, "torch-merged", "torch-grad-scale")
EAGER = (*FAST, "torch-foreach", "torch-for-loop")
EVERYONE = tuple(CONTENDERS)


@dataclass(frozen=True)
class Entry:
    """A case of the suite.

    Args:
        case: the case.
        contenders: keys of CONTENDERS.
        quick: whether `make bench` runs it too.
        rounds: paired rounds; a floor takes 20 or more.
    """

    case: Case
    contenders: tuple[str, ...] = EAGER
    quick: bool = False
    rounds: int = 25


def _quick() -> Iterator[Entry]:
    """A few minutes: what the README shows."""
    yield Entry(Case("64x1Mi"), FAST)
    yield Entry(Case("64x1Mi", recipe="bare"), FAST)
    yield Entry(Case("64x1Mi", optimizer="sgd"), FAST)
    yield Entry(Case("vit-b", "each"), FAST)
    yield Entry(Case("resnet-50", optimizer="sgd"))
    yield Entry(Case("vit-tiny", "each"), (*EAGER, "mmengine-torch-fused", "deepspeed", "optimi"))
    yield Entry(Case("vit-tiny", "two", dtype="bf16-grads"))
    yield Entry(Case("ragged", "each", recipe="amp-clip-accumulate"))
    yield Entry(Case("400x64"))
    yield Entry(Case("400x64", "each"))
    yield Entry(Case("400x64", "each", warm=True))
    yield Entry(Case("400x64", "each", recipe="bare", warm=True), (OURS, RIVAL, *IN_BACKWARD.values()))
    yield Entry(Case("10000x64"), FAST, rounds=20)


def _full() -> Iterator[Entry]:
    """Each axis in full, the others held."""
    for workload in WORKLOADS:
        for grouping in GROUPINGS:
            yield Entry(Case(workload, grouping), FAST)
    for workload, grouping in (("vit-tiny", "each"), ("resnet-50", "one")):
        for optimizer in OPTIMIZERS:
            for recipe in RECIPES:
                yield Entry(Case(workload, grouping, optimizer, recipe))
    for optimizer in ("sgd", "adamw"):
        for dtype in DTYPES:
            recipe = "clip" if dtype == "fp16" else "amp-clip"
            yield Entry(Case("vit-tiny", "two", optimizer, recipe, dtype))
    for optimizer in OPTIMIZERS:
        yield Entry(Case("vit-tiny", "two", optimizer), EVERYONE)
    yield Entry(Case("400x64", warm=True))


def entries(device: str) -> list[Entry]:
    """All entries, the quick ones first, each case once; without what is for GPUs on a CPU."""
    found: dict[str, Entry] = {}
    for quick, source in ((True, _quick()), (False, _full())):
        for entry in source:
            case = replace(entry.case, device=device)
            if device == "cuda" or not WORKLOADS[case.workload].gpu_only:
                found.setdefault(case.name, replace(entry, case=case, quick=quick))
    return list(found.values())
