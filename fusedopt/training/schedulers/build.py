"""build_param_schedulers: build the schedulers of a run from a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...messages import check_whole_number, did_you_mean
from ...undo import unchanged_on_error
from ..registry import PARAM_SCHEDULERS, check_config
from ..wrappers import OptimWrapperDict, SkipAwareScheduler
from .base import _ParamScheduler
from .watching import OptimizerLike

__all__ = ["build_param_schedulers"]

_BUILT = (_ParamScheduler, SkipAwareScheduler)


def build_param_schedulers(
    cfg: Any,
    optim_wrapper: OptimizerLike,
    epoch_length: int | None = None,
    max_epochs: int | None = None,
    max_iters: int | None = None,
) -> list[_ParamScheduler] | dict[str, list[_ParamScheduler]]:
    """Build the schedulers of a run, as the ``build_param_scheduler`` of MMEngine's Runner.

    If one is invalid, the others have not changed the optimizer either.

    Args:
        cfg: a config, a list of them, or None for no scheduler. Existing schedulers are accepted in place of configs,
            also in a :class:`SkipAwareScheduler`. A config has ``type``, its arguments without the optimizer and,
            optionally, ``convert_to_iter_based=True``, to convert arguments in epochs to iterations. For an
            :class:`OptimWrapperDict`, a dict without ``type`` may hold a config or list for each name. Not changed.
        optim_wrapper: a wrapper, an :class:`OptimWrapperDict` or an optimizer.
        epoch_length: iterations in an epoch; ``convert_to_iter_based`` needs it.
        max_epochs: default ``end`` of schedulers by epoch.
        max_iters: default ``end`` of schedulers by iteration.

    Returns:
        The schedulers in order; for an :class:`OptimWrapperDict`, a list for each name.

    Raises:
        KeyError: an unknown ``type``, or ``cfg`` lacks a name of the :class:`OptimWrapperDict`.
        TypeError: a config has the wrong type, or its arguments do not fit.
        ValueError: an argument is out of range, or ``cfg`` has a name that the :class:`OptimWrapperDict` lacks.
    """
    ends = {True: max_epochs, False: max_iters}
    for name, value in (("epoch_length", epoch_length), ("max_epochs", max_epochs), ("max_iters", max_iters)):
        if value is not None:
            check_whole_number(name, value, 1)
    if not isinstance(optim_wrapper, OptimWrapperDict):
        if isinstance(cfg, Mapping) and "type" not in cfg and cfg and all(map(_may_be_config, cfg.values())):
            raise ValueError(
                f"param_scheduler has entries for {', '.join(map(repr, cfg))} and no 'type', but there is one optimizer"
            )
        with unchanged_on_error(optim_wrapper):
            return _build_list("param_scheduler", cfg, optim_wrapper, epoch_length, ends)
    if not isinstance(cfg, Mapping) or "type" in cfg:
        if any(isinstance(entry, _BUILT) for entry in _entries(cfg)):
            raise TypeError(
                "an existing scheduler drives one optimizer; expected a dict with schedulers for each of "
                f"{', '.join(map(repr, optim_wrapper))}"
            )
        cfg = dict.fromkeys(optim_wrapper, cfg)
    for name in cfg:
        if name not in optim_wrapper:
            raise ValueError(
                f"param_scheduler has {name!r}, which is not an optimizer wrapper; {did_you_mean(name, optim_wrapper)}"
            )
    for name in optim_wrapper:
        if name not in cfg:
            raise KeyError(f"param_scheduler has nothing for {name!r}; expected {name}=[] to schedule nothing")
    with unchanged_on_error(optim_wrapper):
        return {
            name: _build_list(f"param_scheduler[{name!r}]", cfg[name], wrapper, epoch_length, ends)
            for name, wrapper in optim_wrapper.items()
        }


def _may_be_config(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple, *_BUILT))


def _entries(cfg: Any) -> Sequence[Any]:
    if cfg is None:
        return []
    return cfg if isinstance(cfg, Sequence) and not isinstance(cfg, str) else [cfg]


def _build_list(
    name: str, cfg: Any, optimizer: OptimizerLike, epoch_length: int | None, ends: Mapping[bool, int | None]
) -> list[_ParamScheduler]:
    entries = _entries(cfg)
    schedulers: list[Any] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, _BUILT):
            schedulers.append(entry)
            continue
        check_config(f"{name}[{index}]" if entries is cfg else name, entry)
        settings = {"optimizer": optimizer, **entry}
        end = ends[bool(settings.get("by_epoch", True))]
        if end is not None:
            settings.setdefault("end", end)
        try:
            schedulers.append(PARAM_SCHEDULERS.build(settings, epoch_length=epoch_length))
        except (KeyError, TypeError, ValueError) as error:
            if len(entries) == 1:
                raise
            raise type(error)(f"scheduler {index} ({entry.get('type')}): {error.args[0]}") from error
    return schedulers
