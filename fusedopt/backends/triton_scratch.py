"""A parameter of its own with any forms of columns, for the Triton backend to measure and to warm up with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..rules import Rule

__all__ = ["ABSENT", "DTYPES", "Scratch", "rounds", "scratch_parameter"]

#: By number, as DType of csrc/tables.h: torch's, and what tensors of the further forms are.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROOT16, _SIGNED8, _UNSIGNED8, _LOW16, _LOW8 = range(len(DTYPES), len(DTYPES) + 5)
_STORED = (*DTYPES, torch.float16, torch.uint8, torch.uint8, torch.int16, torch.uint8)
ABSENT = -1
#: The end of the key under which a state of a form is kept.
_ENDS = {_ROOT16: "_root", _SIGNED8: "_codes", _UNSIGNED8: "_codes"}
_STATES, _MASTER, _AVERAGE, _CHANCE = slice(2, 5), 5, 6, 7


class Scratch(NamedTuple):
    """What a plan is given: ``precision`` is None where all is as torch has it."""

    groups: list[dict[str, Any]]
    state: dict[Any, dict[str, Any]]
    precision: Any


def rounds(dtypes: tuple[int, ...]) -> bool:
    """Whether rows with these columns are rounded by chance: asked for, and something in them can be."""
    param, _, *states = dtypes[:5]
    master, chance = dtypes[_MASTER], dtypes[_CHANCE]
    if not chance:
        return False
    mine = [*states, param] if master == ABSENT else states
    return master == _LOW8 or any(code not in (ABSENT, 0, 1) for code in mine)


def scratch_parameter(rule: Rule, dtypes: tuple[int, ...], elements: int, device: torch.device) -> Scratch:
    """A parameter with a gradient and states, whose columns have these forms (as the plan hands them to a launcher)."""
    states = [code for code in dtypes[_STATES] if code != ABSENT]
    settings = next(trial for trial in rule.trial_settings() if len(rule.needed_columns(trial)) == len(states))
    param = torch.nn.Parameter(torch.zeros(elements, dtype=DTYPES[dtypes[0]], device=device))
    if dtypes[1] != dtypes[0]:
        param.grad_dtype = None
    param.grad = torch.ones(elements, dtype=DTYPES[dtypes[1]], device=device)

    def column(code: int) -> torch.Tensor:
        coded = code in (_SIGNED8, _UNSIGNED8)
        size = (elements + 15) // 16 * 16 + 2 * ((elements + 63) // 64) if coded else elements
        return torch.zeros(size, dtype=_STORED[code], device=device)

    mine: dict[str, Any] = {"step": torch.zeros((), device=device)}
    keys = {known.name: known.name for known in rule.columns}
    for name, code in zip(rule.needed_columns(settings), states, strict=True):
        keys[name] += _ENDS.get(code, "")
        mine[keys[name]] = column(code)
    master, average = dtypes[_MASTER], dtypes[_AVERAGE]
    master_key = None if master == ABSENT else "master" if master == 0 else "master_low"
    if master_key is not None:
        mine[master_key] = column(master)
    if average != ABSENT:
        mine["ema"] = column(average)
    precision = None
    if mine.keys() - {"step", *rule.needed_columns(settings)} or dtypes[_CHANCE]:
        weights = None if average == ABSENT else (0.1, 0.0, 0, 1)
        precision = (list(keys.values()), master_key, (bool(dtypes[_CHANCE]), 0), weights, _numbers)
    return Scratch([{"params": [param], **settings}], {param: mine}, precision)


def _numbers(groups: Any) -> list[None]:
    return [None for group in groups for _ in group["params"]]
