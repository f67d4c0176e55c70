"""What of a fused optimizer is pickled and copied, and shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..backends import BackendUnavailable
from ..messages import plain_groups
from ..rules import PLAIN
from .averages import refuse_while_averaged
from .loading import take_steps_out
from .shared import Shared

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["own_settings", "own_state", "take_own_state", "take_state"]


def own_settings(optimizer: FusedOptimizer) -> dict[str, Any]:
    """What is over all groups, by name, for the text that shows an optimizer."""
    try:
        backend = optimizer.backend_in_use
    except BackendUnavailable:
        backend = f"{optimizer.backend}, which cannot serve"
    precision = optimizer._precision
    kept = {} if precision.is_plain else precision.settings(optimizer.rule)
    own = {"clip_grad": optimizer.clip_grad, "write_back_grads": optimizer.write_back_grads}
    return {**own, **{name: value for name, value in kept.items() if value}, "backend": backend}


def own_state(optimizer: FusedOptimizer) -> dict[str, Any]:
    """What is pickled beside torch's own attributes.

    Raises:
        RuntimeError: the parameters have the values of their averages: the copy would train on from these.
    """
    refuse_while_averaged(optimizer, "a copy or pickle is made")
    shared, counts = optimizer._shared, optimizer._counts
    return {
        "_clip": shared.clip,
        "write_back_grads": shared.write_back_grads,
        "takes_scale": shared.takes_scale,
        "share_of": shared.share_of,  # not to be pickled: better an error than a share that knows no others
        "backend": optimizer.backend,
        "_precision": optimizer._precision,
        "counts": None if counts is None else counts.known(optimizer.state),
    }


def take_own_state(optimizer: FusedOptimizer, state: dict[str, Any]) -> None:
    """Take up what :func:`own_state` made, and out of the dict; an older version did not pickle all of it."""
    own = state.pop("_clip", None), state.pop("write_back_grads", False), state.pop("takes_scale", None)
    optimizer._shared = Shared(*own)
    optimizer._shared.share_of = state.pop("share_of", None)
    optimizer._precision = state.pop("_precision", PLAIN)


def take_state(optimizer: FusedOptimizer, state: dict[str, Any], fill_in: Any) -> None:
    """The ``__setstate__`` of an optimizer: of one that is unpickled, or of groups and state that are loaded.

    Args:
        optimizer: new, or in use.
        state: what was pickled, or groups and state.
        fill_in: torch's own ``__setstate__``.
    """
    fresh = "_optimizer_state_dict_post_hooks" not in optimizer.__dict__
    state = {**state}
    counts = state.pop("counts", None)
    if fresh:
        take_own_state(optimizer, state)
    fill_in(state)
    optimizer._backend = None
    if fresh:
        optimizer._settle()
        if optimizer._counts is not None:
            # Without counts it is from a version that kept them in the state.
            optimizer._take_counts(take_steps_out(optimizer.rule, optimizer.state) if counts is None else counts)
    plain_groups(optimizer.param_groups)
    hyperparameters = optimizer.rule.hyperparameters
    defaults = hyperparameters().as_defaults()
    for group in optimizer.param_groups:
        for key in hyperparameters.filled_in:
            if key in defaults:
                group.setdefault(key, defaults[key])
