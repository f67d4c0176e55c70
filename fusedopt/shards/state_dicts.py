"""torch.distributed.checkpoint, where a process has no state of an optimizer."""

from __future__ import annotations

from typing import Any

from .callers import locals_of_caller

__all__ = ["flat_state_being_loaded", "state_is_being_made"]


def state_is_being_made() -> bool:
    """Whether ``get_state_dict`` or ``set_state_dict`` calls the step, with zeros for gradients and learning rates.

    It does so where an optimizer has no state, so that there is some. Others may have state, and do not step: nothing
    may be asked of them.
    """
    return bool(locals_of_caller("torch.distributed.checkpoint.state_dict", "_init_optim_state"))


def flat_state_being_loaded() -> dict[str, Any] | None:
    """What ``set_state_dict`` was given, in the flattened form, where it calls ``load_state_dict``; else None."""
    given = locals_of_caller("torch.distributed.checkpoint.state_dict", "_load_optim_state_dict").get("state_dict")
    return given if isinstance(given, dict) and "state" not in given else None
