"""fusedopt in Lightning, from the package ``pytorch_lightning``: a callback for the Trainer, and ``fuse`` for Fabric.

Importing this imports that package, and not ``lightning``, for which there is a module of that name.
"""

from __future__ import annotations

from typing import Any

from ..messages.extras import require
from .lightning_parts.fabric import fuse_fabric, unfuse_fabric
from .lightning_parts.trainer import Clipping

__all__ = ["FusedClipping", "fuse", "unfuse"]

_pl: Any = require("pytorch_lightning", "pytorch-lightning")
_fabric: Any = require("lightning_fabric", "pytorch-lightning")


class FusedClipping(Clipping, _pl.Callback):
    """Makes unscaling and clipping part of the step of fused optimizers: ``Trainer(callbacks=[FusedClipping()])``.

    It serves automatic and manual optimization, ``gradient_clip_val`` and ``clip_gradients`` by norm and by value, with
    any precision and any number of optimizers. Stock optimizers beside are left alone. At the end of the fit, also
    after an error, everything in the Trainer is as before.

    Raises:
        ValueError: in ``trainer.fit``: a fused optimizer under a strategy that is not served, such as FSDPStrategy; or
            the Trainer clips, and a fused optimizer has ``clip_grad`` of its own.
    """

    _pl = _pl
    _packages = ("pytorch_lightning", "lightning_fabric")


def fuse(fabric: Any) -> Any:
    """Make ``fabric.clip_gradients`` clip in the step of fused optimizers, and ``16-mixed`` unscale there.

    Clipping by norm returns the norm as a tensor that the step fills in; reading it before the step costs a pass over
    the gradients. Stock optimizers are left alone. Call it at any time, before or after ``fabric.setup``; a second call
    changes nothing.

    Args:
        fabric: a Fabric of the package ``lightning_fabric``.

    Returns:
        The Fabric.

    Raises:
        TypeError: no such Fabric.
        ValueError: its strategy is not served, such as FSDPStrategy.
    """
    fuse_fabric(("lightning_fabric",), _fabric.Fabric, fabric)
    return fabric


def unfuse(fabric: Any) -> Any:
    """Undo :func:`fuse`. Without it nothing happens.

    Args:
        fabric: as for :func:`fuse`.

    Returns:
        The Fabric.

    Raises:
        TypeError: not a Fabric of the package ``lightning_fabric``.
    """
    unfuse_fabric(_fabric.Fabric, fabric)
    return fabric
