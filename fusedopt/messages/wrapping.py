"""What wrappers of a model add to its parameters' names; see Note [Unwrapping] in training/unwrapping.py."""

from __future__ import annotations

__all__ = ["HELD_AS", "bare_name", "barest_name"]

#: The attribute in which each of torch's wrapper classes holds its module. Keyed by class name, since some of these
#: classes take seconds to import.
HELD_AS = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
#: Those of these attributes that no model uses as a module name.
_TELLING = frozenset(HELD_AS.values()) - {"module"}


def bare_name(name: str) -> str:
    """The name of a parameter or state dict entry without what torch.compile and FSDP add to it."""
    return ".".join(part for part in name.split(".") if part not in _TELLING)


def barest_name(name: str) -> str:
    """As :func:`bare_name`, also without ``module``, which wrappers of a model or of its parts add."""
    return ".".join(part for part in bare_name(name).split(".") if part != "module")
