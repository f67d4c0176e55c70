"""Optimizers of which each process has one with a share of the parameters: ZeRO."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["share_being_made"]


def share_being_made() -> Any:
    """The process group whose processes share the parameters of the optimizer that is being made, or None.

    ``torch.distributed.optim.ZeroRedundancyOptimizer`` makes the optimizer of its share as anybody would, from the
    class or function that it was given. Clipping by the norm of its share alone, each process would do something else.
    So it is looked for among the callers.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = None if module is None else sys._getframe(1)
    while module is not None and frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            return caller.process_group
        frame = frame.f_back
    return None
