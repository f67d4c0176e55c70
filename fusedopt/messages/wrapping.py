"""What wrappers of a model add to the names of its parameters, see Note [Unwrapping] in training/unwrapping.py."""

from __future__ import annotations

__all__ = ["HELD_AS", "bare_name", "barest_name"]

#: Under which name torch's classes hold the module they are around. Told by the names of the classes, since some of
#: them take seconds to import.
HELD_AS = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
#: Of these, the names that no module of a model has.
_TELLING = frozenset(HELD_AS.values()) - {"module"}


def bare_name(name: str) -> str:
    """The name of a parameter or of an entry of a state dict without what torch.compile and FSDP add to it."""
    return ".".join(part for part in name.split(".") if part not in _TELLING)


def barest_name(name: str) -> str:
    """The same without the part ``module`` either, which wrappers of the whole model and of parts of it add."""
    return ".".join(part for part in bare_name(name).split(".") if part != "module")
