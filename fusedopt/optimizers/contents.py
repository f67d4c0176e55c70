"""What users read of an optimizer's state: as torch has it, masters, averages, and how many bytes it takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rules.masters import master_of
from .averages import averages_in_place, averages_of, refuse_while_averaged
from .memory import Memory, memory_of
from .saving import as_torch_has_it

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["Contents"]


class Contents:
    """The part of :class:`FusedOptimizer` that shows what is in its state."""

    def state_dict(self, as_torch: bool = False) -> dict[str, Any]:
        """The state and the groups, as ``torch.optim.Optimizer.state_dict``.

        Tensors are those of the optimizer, in the form in which it keeps them; where parameters are dealt out over
        processes, and for torch.distributed.checkpoint, codes and roots are decoded, and a master is whole.

        Args:
            as_torch: give the layout of torch's optimizer instead, with moments in float32 (float64 where they are
                that): what ``torch.optim`` loads. Masters and averages are not in it; see :meth:`master_weights` and
                :meth:`averages`.

        Raises:
            RuntimeError: the parameters have the values of their averages, see :meth:`averaged`.
        """
        self._refuse_while_averaged("state_dict()")
        saved: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        if as_torch:
            own: FusedOptimizer = self  # type: ignore[assignment]
            params = [param for group in own.param_groups for param in group["params"]]
            saved["state"] = {
                key: as_torch_has_it(own, params[key], entry) if isinstance(key, int) and key < len(params) else entry
                for key, entry in saved["state"].items()
            }
        return saved

    def master_weights(self) -> dict[Tensor, Tensor]:
        """What each parameter exactly is, by parameter: copies in float32, or in float64 of float64 parameters.

        That of a 16-bit parameter with a ``master`` has the bits that the parameter lacks.

        Raises:
            RuntimeError: the parameters have the values of their averages, see :meth:`averaged`.
        """
        self._refuse_while_averaged("master_weights()")
        own: FusedOptimizer = self  # type: ignore[assignment]
        params = [param for group in own.param_groups for param in group["params"]]
        return {param: master_of(param, own.state.get(param) or {}) for param in params}

    def averages(self) -> dict[Tensor, Tensor]:
        """The average of each parameter, by parameter: the tensors that the steps write, not copies.

        Of a parameter that has not stepped it is the parameter's own value.

        Raises:
            RuntimeError: the optimizer was made without ``ema``.
        """
        own: FusedOptimizer = self  # type: ignore[assignment]
        return averages_of(own)

    def averaged(self) -> AbstractContextManager[dict[Tensor, Tensor]]:
        """``with optimizer.averaged():`` gives the parameters the values of their averages inside the block.

        They are rounded to the parameters' dtype. Values are written to the parameters themselves, so the model and
        other references see them; after the block, and after an error in it, each has its own bits again, and nothing
        of the training has changed. The own values are kept meanwhile, which takes memory of the model's size. Buffers
        are as the model has them. Inside the block the optimizer neither steps, saves nor loads.

        Returns:
            A context manager; its value is that of :meth:`averages`.

        Raises:
            RuntimeError: the optimizer was made without ``ema``, or the block is inside of another one.
        """
        own: FusedOptimizer = self  # type: ignore[assignment]
        return averages_in_place(own)

    def bytes_per_parameter(self) -> Memory:
        """The bytes that training takes for each element of the parameters, held and moved in a step.

        They are counted by the tensors that there are, or will be after the first step, in this process.
        """
        own: FusedOptimizer = self  # type: ignore[assignment]
        return memory_of(own)

    def _refuse_while_averaged(self, what: str) -> None:
        own: FusedOptimizer = self  # type: ignore[assignment]
        refuse_while_averaged(own, what)
