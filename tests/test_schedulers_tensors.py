"""Settings that are tensors, of a group's own or shared by groups, are scheduled as numbers are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_resume_registry import SCHEDULERS

import fusedopt
from fusedopt.training.registry import PARAM_SCHEDULERS
from fusedopt.training.schedulers import CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, ReduceOnPlateauLR
from fusedopt.training.wrappers import OptimWrapper

CLASSES = {"SGD": fusedopt.FusedSGD, "AdamW": fusedopt.FusedAdamW, "torch": torch.optim.SGD}


def wrapper(kind: str, form: str, groups: int = 3, lr: float = 0.1) -> OptimWrapper:
    """An optimizer of ``groups`` groups whose settings are numbers, tensors of their own, or shared tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def setting(key: str, value: float) -> Any:
        tensor = torch.tensor(value, dtype=torch.float64)
        return {"numbers": value, "own": tensor, "shared": tensors.setdefault(key, tensor)}[form]

    own: list[dict[str, Any]] = []
    for _ in range(groups):
        group = dict(
            params=[torch.nn.Parameter(torch.zeros(2))], lr=setting("lr", lr), weight_decay=setting("wd", 0.01)
        )
        if kind == "AdamW":
            group["betas"] = (setting("beta1", 0.9), setting("beta2", 0.99))
        else:
            group["momentum"] = setting("momentum", 0.9)
        own.append(group)
    optimizer = CLASSES[kind](own, lr=setting("lr", lr))
    optimizer._opt_called = True
    return OptimWrapper(optimizer)


def moved(groups: list[dict[str, Any]]) -> list[list[float]]:
    return [
        [float(group[key]) for key in ("lr", "weight_decay", "momentum") if key in group]
        + [float(beta) for beta in group.get("betas", ())]
        for group in groups
    ]


def tensors_in(driven: OptimWrapper) -> set[int]:
    settings = [value for group in driven.optimizer.param_groups for value in (group["lr"], group["weight_decay"])]
    return {id(value) for value in settings if isinstance(value, torch.Tensor)}


def run(name: str, kind: str, form: str) -> list[list[list[float]]]:
    driven = wrapper(kind, form)
    before = tensors_in(driven)
    scheduler = PARAM_SCHEDULERS.build({"type": name, "optimizer": driven, "end": 6, **SCHEDULERS[name]})
    values = [moved(driven.param_groups)]
    for _ in range(6):
        scheduler.step()
        if getattr(scheduler, "need_val_args", False):
            scheduler.step({"count": 1.0})
        values.append(moved(driven.param_groups))
    assert tensors_in(driven) == before, "a captured CUDA graph reads these very tensors"
    return values


@pytest.mark.parametrize("form", ["own", "shared"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_tensors_move_as_numbers_do(name: str, kind: str, form: str) -> None:
    numbers, tensors = run(name, kind, "numbers"), run(name, kind, form)
    for step, (one, other) in enumerate(zip(numbers, tensors, strict=True)):
        for number, tensor in zip(one, other, strict=True):
            for expected, found in zip(number, tensor, strict=True):
                assert math.isclose(found, expected, rel_tol=1e-9), (step, number, tensor)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_plateau_reduces_a_shared_tensor_once(kind: str) -> None:
    driven = wrapper(kind, "shared", groups=6, lr=1e-3)
    plateau = ReduceOnPlateauLR(driven, patience=0, factor=0.1)
    for _ in range(2):
        plateau.step(1.0)
    assert moved(driven.param_groups)[0][0] == pytest.approx(1e-4)
    assert plateau.get_last_value() == [pytest.approx(1e-4)] * 7


def test_views_of_one_memory_are_shared_too() -> None:
    memory = torch.tensor([0.1, 0.2])
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    sgd = torch.optim.SGD([dict(params=[each], lr=memory[number // 2]) for number, each in enumerate(params)], lr=1.0)
    plateau = ReduceOnPlateauLR(sgd, patience=0, factor=0.5)
    for _ in range(2):
        plateau.step(1.0)
    assert memory.tolist() == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize(
    ("build", "name", "key"),
    [
        (lambda driven, ends: OneCycleLR(driven, eta_max=ends, total_steps=4), "eta_max", "lr"),
        (lambda driven, ends: ReduceLROnPlateau(driven, min_lr=ends), "min_lr", "lr"),
        (lambda driven, ends: CyclicLR(driven, base_lr=0.01, max_lr=ends, cycle_momentum=False), "max_lr", "lr"),
        (
            lambda driven, ends: CyclicLR(driven, base_lr=0.01, max_lr=0.1, base_momentum=ends, max_momentum=0.9),
            "base_momentum",
            "momentum",
        ),
        (lambda driven, ends: LambdaLR(driven, [lambda step, end=end: end for end in ends]), "lr_lambda", "lr"),
    ],
)
def test_one_tensor_cannot_have_two_values(build: Any, name: str, key: str) -> None:
    driven = wrapper("SGD", "shared", groups=2)
    before = moved(driven.param_groups)
    message = (
        rf"{name} has .* for param_groups\[0\] and .* for param_groups\[1\], which share one tensor as their '{key}'"
    )
    with pytest.raises(ValueError, match=message):
        build(driven, [0.1, 0.2])
    assert moved(driven.param_groups) == before
    build(wrapper("SGD", "own", groups=2), [0.1, 0.2])
    build(wrapper("SGD", "shared", groups=2), [0.2, 0.2]) if name != "lr_lambda" else None


def test_the_base_settings_take_what_the_group_takes_whose_tensor_they_share() -> None:
    default = torch.tensor(0.1)
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    sgd = torch.optim.SGD([dict(params=params[:1]), dict(params=params[1:], lr=torch.tensor(0.1))], lr=default)
    driven = OptimWrapper(sgd)
    OneCycleLR(driven, eta_max=[0.25, 0.5], total_steps=4)
    assert driven.get_lr()["base_lr"][0] is default
    assert [float(group["lr"]) for group in driven.param_groups] == pytest.approx([0.01, 0.02, 0.01])
