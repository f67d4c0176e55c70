"""Functions that run outside of the graphs of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

__all__ = ["outside_of_graphs"]

P = ParamSpec("P")
R = TypeVar("R")


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable(function)``, but the compiler is imported at the first call.

    To a caller that is compiled with ``fullgraph=True``, torch names the reason.
    """
    outside = _disable_dynamo(function)
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    outside._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "the step of a fused optimizer or of its loss scaler runs outside of graphs; expected torch.compile without "
        "fullgraph=True, or of the model alone"
    )
    return outside
