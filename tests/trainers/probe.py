"""What a trainer does with the gradients outside of a fused step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class GradientPasses(TorchDispatchMode):
    """``with GradientPasses(params) as passes:`` notes each operation on a gradient of theirs, by name.

    A fused step does its work in one call of its own, which is not seen; what is left is what others do: unscale, norm,
    multiply, clamp. To add to a gradient, to set it to zero and to look at its shape are no such passes.
    """

    _NONE = ("aten.add_", "aten.zero_", "aten._foreach_zero_", "aten.detach", "aten.alias", "aten.view", "aten.copy_")

    def __init__(self, params: Iterable[Tensor]):
        super().__init__()
        self._params = list(params)
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not name.startswith(self._NONE):
            grads = {param.grad.data_ptr() for param in self._params if param.grad is not None and param.grad.numel()}
            if any(isinstance(each, Tensor) and each.numel() and each.data_ptr() in grads for each in tree_iter(args)):
                self.seen.append(name)
        return func(*args, **(kwargs or {}))
