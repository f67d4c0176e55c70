"""The update formulas in float64, of tests/optimizers, and the error bound of a step.

A step is checked from the state it really started from, so errors do not add up over steps and the bound is tight:
half a unit in the last place of the stored dtype, plus a few roundings of the compute dtype. The self-test of the
package has the same bound: it is defined in fusedopt/rules/bounds.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from optimizers import TESTED, Value

from fusedopt.rules.bounds import CLIPPED_ROUNDINGS, ROUNDINGS, error_bound

#: By the names of fusedopt.rules.
FORMULAS = {name: tested.formula for name, tested in TESTED.items()}


def as_double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().copy()


def assert_matches(name: str, stored: torch.Tensor, want: Value, compute: torch.dtype, roundings: int) -> None:
    """Assert that ``stored`` is ``want`` rounded once to its dtype, up to a few roundings of the compute dtype."""
    exact, magnitude = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (want.exact, want.magnitude))
    bound = error_bound(exact, magnitude, stored.dtype, compute, roundings).numpy()
    error = np.abs(as_double(stored) - want.exact)
    limit = torch.finfo(stored.dtype).max
    ok = (error <= bound) | ((np.abs(want.exact) >= limit) & ~np.isfinite(as_double(stored)))
    if not ok.all():
        worst = np.unravel_index(np.argmax(np.where(ok, 0, error / bound)), error.shape)
        raise AssertionError(
            f"{name}: {np.count_nonzero(~ok)} of {ok.size} elements are off; at {worst} got "
            f"{as_double(stored)[worst]!r}, want {want.exact[worst]!r}, error / bound {(error / bound)[worst]:.3g}"
        )


def steps_taken(optimizer: Any, param: torch.Tensor) -> int:
    """The step count of a parameter, wherever it lies. A column that was put there by hand is real."""
    state = optimizer.state.get(param, {})
    if optimizer._counts is None:
        return int(state.get("step", 0))
    column = state.get(optimizer.rule.columns[0].name)
    count = optimizer._counts.of(param, column)
    return int(column is not None) if count is None else int(count)


class CheckedStep:
    """Takes a snapshot of an optimizer before a step, and checks what the step made of it.

    Args:
        optimizer: a fused optimizer whose parameters have their gradients.
        multiplier: what the step is to multiply the gradients with (inverse scale times clip coefficient).
        clip_value: bound of value clipping.
    """

    def __init__(self, optimizer: Any, multiplier: float = 1.0, clip_value: float = np.inf):
        self.optimizer = optimizer
        self.roundings = CLIPPED_ROUNDINGS if multiplier != 1 and optimizer.clip_grad else ROUNDINGS
        self.rows = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                columns = {key: as_double(value) for key, value in state.items() if key != "step"}
                for column in optimizer.rule.columns:
                    columns.setdefault(column.name, np.zeros(tuple(param.shape)))
                step = steps_taken(optimizer, param) + 1
                g = np.clip(as_double(param.grad) * multiplier, -clip_value, clip_value)
                want = FORMULAS[optimizer.rule.name](group, as_double(param), g, columns, step)
                self.rows.append((param, want, step))

    def check(self) -> None:
        for param, want, step in self.rows:
            compute = torch.float64 if param.dtype == torch.float64 else torch.float32
            state = self.optimizer.state.get(param, {})
            for name, value in want.items():
                stored = param if name == "param" else state[name]
                if stored.numel():
                    assert_matches(
                        f"{name} of shape {tuple(param.shape)} at step {step}", stored, value, compute, self.roundings
                    )
            if state:
                assert steps_taken(self.optimizer, param) == step
