"""What the tests of the emulated CUDA kernels share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    OPTIONS,
    PTX,
    PTX_BACKENDS,
    SMALL,
    bits,
    bits_but_for_nan,
    module,
    parameters,
    use_ptx,
    whole_state,
)
from torch import nn

emulator: Any = getattr(module, "emulator", None)

NORMS = [1.0, 2.0, 3.0, 0.5, INF]
#: A bound that no gradient of these tests reaches: the coefficient is 1, so results are those without clipping.
LOOSE = {"max_norm": 1e9}
CLIPS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "norm": {"max_norm": 0.5},
    "value": {"type": "value", "clip_value": 0.25},
}
each_clip = pytest.mark.parametrize("clip", CLIPS)
each_emulated = pytest.mark.parametrize("backend", ["emulated", "emulated-pair"])


@pytest.fixture(
    autouse=True,
    params=["host", *(pytest.param(name, marks=pytest.mark.ptx) for name in PTX_BACKENDS if PTX == "nvcc")],
)
def _code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as host code, or their PTX in the interpreter; a NaN that a GPU makes has another payload."""
    if request.param != "host":
        use_ptx(request.param)
        for place in (sys.modules[__name__], request.module):
            monkeypatch.setattr(place, "bits", bits_but_for_nan)


def make(
    option: str,
    backend: str,
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> tuple[Any, list[nn.Parameter]]:
    cls, options = OPTIONS[option]
    params = parameters(SMALL if shapes is None else shapes, dtype)
    return cls(params, **{**copy.deepcopy(options), **extra}, backend=backend), params


def contents(optimizer: Any) -> list[tuple[bytes, dict[str, bytes]]]:
    """The bits of each parameter and of its state, the step count of any rule included."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        (bits([param])[0], {name: bits([value])[0] for name, value in whole_state(optimizer, param).items()})
        for param in params
    ]


def reported(optimizer: Any) -> list[bytes | None]:
    report = optimizer.last_step
    return [
        None if value is None else bits([value])[0] for value in (report.grad_norm, report.clip_coef, report.found_inf)
    ]


def mixed(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Parameters of all dtypes in turns."""
    values = parameters(shapes, seed=seed)
    return [nn.Parameter(value.detach().to(DTYPES[index % 4])) for index, value in enumerate(values)]


def launches_of(step: Callable[[], Any]) -> int:
    before = emulator.launch_count()
    step()
    return emulator.launch_count() - before


def placed(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` elements after a 16-byte boundary, amid a bucket of sevens."""
    bucket = torch.full((tensor.numel() + 24,), 7.0, dtype=tensor.dtype)
    assert bucket.data_ptr() % 16 == 0
    view = bucket[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def with_holes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], -1)[..., ::2].copy_(tensor)


def rows_of_one_number(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :1].clone().expand(tensor.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "with holes": with_holes,
    "expanded": rows_of_one_number,
}
