"""Steps inside a backward pass."""

from __future__ import annotations

import torch

__all__ = ["refuse_part_of_a_norm"]


def refuse_part_of_a_norm() -> None:
    """Raise RuntimeError in a backward pass, where the gradients that a step is to find the norm of are not all there.

    An optimizer in backward (one for each parameter, stepped in ``register_post_accumulate_grad_hook``) would clip by
    the norm of one parameter.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a step with clip_grad max_norm inside a backward pass would clip by the norm of a part of the gradients; "
            "expected a step after backward(), clip_grad with clip_value, or grad_norm=... of somebody who knows the "
            "norm"
        )
