"""State dicts with parts exchanged: an optimizer loads one, and then steps; or it refuses it and has not changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import atheris
import torch
from torch import nn

import fusedopt

OPTIMIZERS = {
    "FusedSGD": dict(lr=0.1, momentum=0.9),
    "FusedAdam": dict(lr=0.1, amsgrad=True),
    "FusedAdamW": dict(lr=0.1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
SHAPES = [(), (0,), (3,), (2, 3), (3, 2), (1,)]
KEYS = ["state", "param_groups", "params", "step", "exp_avg", "momentum_buffer", "lr", "betas", "param_names", 0, 1, -1]
PLAIN = [None, True, 0, -1, 2**70, 0.5, float("nan"), float("inf"), "", "lr", b"", (), [], {}, {1, 2}, 1j]


def seeds() -> Iterator[bytes]:
    """Sequences of choices."""
    yield from (bytes([number]) + bytes((number * step) % 256 for step in range(150)) for number in range(1, 200, 9))


def built(name: str) -> Any:
    """An optimizer after two steps."""
    torch.manual_seed(0)
    first, second, third = (nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (3,), (4,)))
    optimizer = getattr(fusedopt, name)(
        [dict(params=[first, second]), dict(params=[third], lr=0.5)], **OPTIMIZERS[name]
    )
    for _ in range(2):
        step(optimizer)
    return optimizer


def step(optimizer: Any) -> None:
    """A step with gradients of ones."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def value(choices: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    """A plain value, a tensor, or a container of these."""
    kind = choices.ConsumeIntInRange(0, 7 if depth < 3 else 3)
    if kind <= 1:
        return copy.deepcopy(choices.PickValueInList(PLAIN))
    if kind == 2:
        return choices.ConsumeRegularFloat()
    if kind == 3:
        dtype, shape = choices.PickValueInList(DTYPES), choices.PickValueInList(SHAPES)
        made = torch.full(shape, choices.ConsumeIntInRange(0, 3)).to(dtype)
        return made.to_sparse() if choices.ConsumeBool() and shape else made
    items = [value(choices, depth + 1) for _ in range(choices.ConsumeIntInRange(0, 3))]
    if kind == 4:
        return items
    if kind == 5:
        return tuple(items)
    return OrderedDict((choices.PickValueInList(KEYS), item) for item in items)


def changed(state_dict: Any, choices: atheris.FuzzedDataProvider) -> Any:
    """``state_dict`` with a part replaced, removed or added."""
    if not isinstance(state_dict, (dict, list)) or not state_dict or choices.ConsumeIntInRange(0, 5) == 0:
        return value(choices)
    if choices.ConsumeIntInRange(0, 9) == 0 and isinstance(state_dict, dict):
        state_dict[choices.PickValueInList(KEYS)] = value(choices)
        return state_dict
    key = choices.PickValueInList(list(state_dict) if isinstance(state_dict, dict) else list(range(len(state_dict))))
    if choices.ConsumeIntInRange(0, 9) == 0:
        del state_dict[key]
    else:
        state_dict[key] = changed(state_dict[key], choices)
    return state_dict


def run(data: bytes, folder: Path) -> None:
    """Load a state dict with a few changes."""
    choices = atheris.FuzzedDataProvider(data)
    names = list(OPTIMIZERS)
    optimizer, donor = built(choices.PickValueInList(names)), built(choices.PickValueInList(names))
    state_dict = copy.deepcopy(donor.state_dict())
    for _ in range(choices.ConsumeIntInRange(1, 3)):
        state_dict = changed(state_dict, choices)
    given, before = repr(state_dict), repr(optimizer.state_dict())
    try:
        optimizer.load_state_dict(state_dict)
    except (ValueError, KeyError, TypeError):
        assert repr(optimizer.state_dict()) == before, f"changed by {given}"
    assert repr(state_dict) == given, f"the state dict was changed: {given}"
    step(optimizer)
