"""Optimizers of which each process has one with a share of the parameters: ZeRO."""

from __future__ import annotations

from typing import Any

from .callers import locals_of_caller

__all__ = ["share_being_made"]


def share_being_made() -> Any:
    """The process group whose processes share the parameters of the optimizer that is being made, or None.

    ``torch.distributed.optim.ZeroRedundancyOptimizer`` makes the optimizer of its share as anybody would, from the
    class or function that it was given. Clipping by the norm of its share alone, each process would do something else.
    So it is looked for among the callers.
    """
    caller = locals_of_caller("torch.distributed.optim.zero_redundancy_optimizer", "_init_local_optimizer")
    return caller["self"].process_group if caller else None
