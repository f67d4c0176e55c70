"""MessageHub: what is logged, and where a training stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..rules.checks import check_whole_number
from .checkpoint import unloadable_parts

__all__ = ["HistoryBuffer", "MessageHub"]


class HistoryBuffer:
    """The last values of a logged scalar.

    Tensors stay where they are until a value is read, so that logging an iteration does not wait for the device.

    Args:
        size: how many values are kept.
    """

    def __init__(self, size: int):
        self._values: deque[float | Tensor] = deque(maxlen=size)

    def update(self, value: float | Tensor) -> None:
        """Add a number, or a tensor of one element.

        Raises:
            TypeError, ValueError: it is neither.
        """
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"a tensor of one element is expected, got shape {tuple(value.shape)}")
        self._values.append(value.detach() if isinstance(value, Tensor) else float(value))

    @property
    def data(self) -> list[float]:
        """The values, oldest first."""
        tensors = [value.reshape(()).double() for value in self._values if isinstance(value, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        numbers = [next(read) if isinstance(value, Tensor) else value for value in self._values]
        self._values = deque(numbers, self._values.maxlen)
        return numbers

    def current(self) -> float:
        """The last value."""
        return float(self._values[-1])

    def mean(self) -> float:
        """The mean of the values that are kept."""
        values = self.data
        return sum(values) / len(values)


class MessageHub:
    """Scalars and information by name, in which hooks leave and find things, as ``mmengine.logging.MessageHub``.

    Args:
        window_size: how many values of a scalar are kept, to be averaged in the log.

    Attributes:
        log_scalars: a :class:`HistoryBuffer` by name, such as ``'train/loss'``.
        runtime_info: anything else by name, such as ``'iter'``.
    """

    def __init__(self, window_size: int = 10):
        self.window_size = check_whole_number("window_size", window_size, 1)
        self.log_scalars: dict[str, HistoryBuffer] = {}
        self.runtime_info: dict[str, Any] = {}

    def update_scalar(self, key: str, value: float | Tensor) -> None:
        """Add a value to a scalar.

        Raises:
            ValueError: it is neither a number nor a tensor of one element.
        """
        buffer = self.log_scalars.get(key, HistoryBuffer(self.window_size))
        try:
            buffer.update(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} is logged as a number: {error}") from error
        self.log_scalars[key] = buffer

    def update_info(self, key: str, value: Any) -> None:
        """Set an information."""
        self.runtime_info[key] = value

    def pop_info(self, key: str, default: Any = None) -> Any:
        """Remove an information and return it."""
        return self.runtime_info.pop(key, default)

    def get_scalar(self, key: str) -> HistoryBuffer:
        """The values of a scalar; KeyError for one that was never updated."""
        if key not in self.log_scalars:
            raise KeyError(f"no scalar {key!r} was logged")
        return self.log_scalars[key]

    def get_info(self, key: str, default: Any = None) -> Any:
        """An information, or ``default``."""
        return self.runtime_info.get(key, default)

    def state_dict(self) -> dict[str, Any]:
        """Values and information, without what a checkpoint cannot hold; it waits for the device."""
        infos = self.runtime_info
        return {
            "log_scalars": {key: buffer.data for key, buffer in self.log_scalars.items()},
            "runtime_info": {key: infos[key] for key in infos if not any(unloadable_parts(infos[key], key))},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        buffers = {}
        for key, values in state_dict["log_scalars"].items():
            buffers[key] = HistoryBuffer(self.window_size)
            for value in values:
                buffers[key].update(value)
        self.log_scalars, self.runtime_info = buffers, dict(state_dict["runtime_info"])
