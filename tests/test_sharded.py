"""Two processes: sharded models whose optimizer clips and skips by what all of them found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import HAS_EMULATOR, INF
from sharded_cases import (
    MARKS,
    Case,
    Outcomes,
    alone,
    assert_close,
    assert_reports,
    assert_skipped,
    overflowed,
    run,
    trained,
)

pytestmark = MARKS
WORLD = 2

CLIP = dict(max_norm=0.3)
SGD = dict(optimizer="SGD", settings=dict(lr=0.05, momentum=0.9, weight_decay=0.1))
PLAIN_SGD = dict(optimizer="SGD", settings=dict(lr=0.05))
AMSGRAD = dict(optimizer="Adam", settings=dict(lr=0.05, amsgrad=True))

#: How models of fully_shard are trained.
TRAINED: dict[str, Case] = {
    "unclipped": Case(),
    "clipped": Case(clip=CLIP),
    "barely-clipped": Case(clip=dict(max_norm=100.0)),
    "norm-1": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1)),
    "norm-3": Case(**AMSGRAD, clip=dict(max_norm=0.1, norm_type=3.0)),
    "norm-inf": Case(**PLAIN_SGD, clip=dict(max_norm=0.05, norm_type="inf")),
    "only-report": Case(clip=dict(max_norm=INF)),
    "tensor-max-norm": Case(**SGD, clip=dict(max_norm=torch.tensor(0.3, dtype=torch.float64))),
    "value": Case(**AMSGRAD, clip=dict(type="value", clip_value=0.02)),
    "plain-momentum": Case(**SGD),
    "plain-sgd": Case(**PLAIN_SGD, clip=CLIP),
    "frozen": Case(clip=CLIP, frozen=("up.weight", "down.bias", "head.weight")),
    "unused": Case(clip=CLIP, unused=True),
    "accumulated": Case(clip=CLIP, accumulate=2),
    "scheduled": Case(**SGD, clip=CLIP, scheduled=True),
    "tensor-lr": Case(settings=dict(lr=torch.tensor(0.05, dtype=torch.float64)), clip=CLIP, scheduled=True),
    "closure": Case(clip=CLIP, closure=True),
    "hooks": Case(**SGD, clip=CLIP, hooks=True),
    "written-back": Case(**SGD, clip=CLIP, write_back=True),
    "written-back-values": Case(clip=dict(type="value", clip_value=0.02), write_back=True),
    "float32": Case(clip=CLIP, dtype=torch.float32),
    "reference": Case(clip=CLIP, backend="reference", write_back=True),
    "reference-norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf"), backend="reference"),
}
if HAS_EMULATOR:
    for emulated in ("emulated", "emulated-pair"):
        TRAINED |= {
            f"{emulated}": Case(clip=CLIP, backend=emulated, write_back=True),
            f"{emulated}-norm-1": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1), backend=emulated, unused=True),
            f"{emulated}-norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf"), backend=emulated),
        }


SCENARIOS: dict[str, Any] = {f"fsdp-{name}": (trained, ("fsdp", case)) for name, case in TRAINED.items()}
# What differs between ways to shard is whom a step asks, and what for.
OTHERS = ["clipped", "norm-3", "norm-inf", "value", "scheduled"]
MORE = ["norm-1", "only-report", "tensor-max-norm", "plain-sgd", "closure", "hooks", "reference"]
OF_SHARDINGS = {
    "tp": [*OTHERS, *MORE, "frozen", "written-back", "emulated", "emulated-pair-norm-1"],
    "fsdp1": [*OTHERS, *MORE, "frozen"],
    "fsdp1-flat": ["clipped", "norm-inf"],
    "fsdp1-none": ["clipped", "norm-inf"],
    "zero": [*OTHERS, *MORE],
    "zero-torch": [*OTHERS, *MORE],
}
for sharding, names in OF_SHARDINGS.items():
    SCENARIOS |= {f"{sharding}-{name}": (trained, (sharding, TRAINED[name])) for name in names if name in TRAINED}
TRAININGS = list(SCENARIOS)

OVERFLOWS = {
    f"overflow-{sharding}-{scaler}-{name}-{at}{'-by-hand' if by_hand else ''}": (
        overflowed,
        (sharding, TRAINED[name], scaler, at, by_hand),
    )
    for sharding in ("fsdp", "tp", "fsdp1", "fsdp1-flat", "fsdp1-none", "zero", "zero-torch")
    for scaler in ("ours", "stock", "sharded")
    for name, at, by_hand in (
        ("unclipped", 0, False),
        ("clipped", 0, False),
        ("plain-momentum", 2, False),
        ("reference", 2, False),
        ("clipped", 2, True),
    )
    if not (sharding in ("fsdp1-flat", "fsdp1-none") and name in ("unclipped", "reference"))
    # torch's functions for scalers take no plain gradients beside those of DTensors.
    if sharding != "tp" or (scaler == "ours" and not by_hand)
}
SCENARIOS |= OVERFLOWS


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run(SCENARIOS, WORLD, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("scenario", TRAININGS)
def test_trains_as_one_process_with_the_whole_batch(outcomes: Outcomes, scenario: str) -> None:
    case: Case = SCENARIOS[scenario][1][1]
    results, expected = outcomes[scenario], alone(case)
    tolerance = {} if case.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    assert_reports(results, case, expected, **tolerance)
    for result in results:
        assert_close(result.parameters, expected.parameters, **tolerance)
        if result.state:
            assert_close(result.state, expected.state, **tolerance)
        if case.write_back and result.state:
            assert_close(dict(enumerate(result.grads)), dict(enumerate(expected.grads)), **tolerance)
        assert result.rest == (3 if case.hooks else 0)


@pytest.mark.parametrize("scenario", OVERFLOWS)
def test_an_overflow_in_one_process_skips_the_step_in_all(outcomes: Outcomes, scenario: str) -> None:
    sharding, case, scaler, at, by_hand = OVERFLOWS[scenario][1]
    # Of these wrappers, torch's scalers keep the optimizer from stepping by themselves.
    skips_itself = sharding == "zero-torch" or (sharding == "zero" and (scaler != "ours" or by_hand))
    assert_skipped(outcomes[scenario], case, at, reported=not skips_itself)
