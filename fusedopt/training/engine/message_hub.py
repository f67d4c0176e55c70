"""MessageHub: logged values, and the progress of a run."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...messages import check_whole_number
from ..portable import as_before, portable
from .checkpoint import unloadable_parts

__all__ = ["HistoryBuffer", "MessageHub"]


class HistoryBuffer:
    """The last values of a logged scalar.

    Tensors stay where they are until a value is read, so that logging an iteration does not wait for the device.

    Args:
        size: number of values to keep.
        values: initial values, with None for each one that is left out.
    """

    def __init__(self, size: int, values: Iterable[float | None] = ()):
        # A number, None, or tensors still on the device: the value, and optionally whether it is left out.
        self._values: deque[float | tuple[Tensor, ...] | None] = deque(maxlen=size)
        self._values.extend(None if value is None else float(value) for value in values)

    def update(self, value: float | Tensor, unless: Tensor | None = None) -> None:
        """Add a number, or a tensor of one element.

        Args:
            value: the number.
            unless: a bool tensor of one element; if True, ``value``, then a tensor, is left out on reading.

        Raises:
            TypeError, ValueError: ``value`` is neither.
        """
        if not isinstance(value, Tensor):
            self._values.append(float(value))
        elif value.numel() != 1:
            raise ValueError(f"a tensor of one element is expected, got shape {tuple(value.shape)}")
        else:
            self._values.append((value.detach(),) if unless is None else (value.detach(), unless))

    @property
    def slots(self) -> list[float | None]:
        """The values, oldest first, with None for each one that is left out."""
        pending = [tensor for entry in self._values if isinstance(entry, tuple) for tensor in entry]
        tensors = [tensor.reshape(()).to(pending[0].device, torch.float64) for tensor in pending]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        slots: list[float | None] = []
        for entry in self._values:
            if isinstance(entry, tuple):
                number, *left_out = [next(read) for _ in entry]
                slots.append(None if any(left_out) else number)
            else:
                slots.append(entry)
        self._values = deque(slots, self._values.maxlen)
        return slots

    @property
    def data(self) -> list[float]:
        """The values, oldest first, without those that are left out."""
        return [value for value in self.slots if value is not None]

    def current(self) -> float:
        """The last value."""
        return self.data[-1]

    def mean(self) -> float:
        """The mean of the values."""
        values = self.data
        return sum(values) / len(values)


class MessageHub:
    """Scalars and information by name, shared between hooks, as ``mmengine.logging.MessageHub``.

    Args:
        window_size: number of values of each scalar to keep and to average in the log.

    Attributes:
        log_scalars: a :class:`HistoryBuffer` by name, such as ``'train/loss'``.
        runtime_info: anything else by name, such as ``'iter'``.
    """

    # The instance of this thread, and the latest of any: for threads that a model starts, which inherit no context.
    _current: ClassVar[ContextVar[MessageHub | None]] = ContextVar("message_hub", default=None)
    _latest: ClassVar[MessageHub | None] = None

    def __init__(self, window_size: int = 10):
        self.window_size = check_whole_number("window_size", window_size, 1)
        self.log_scalars: dict[str, HistoryBuffer] = {}
        self.runtime_info: dict[str, Any] = {}

    @classmethod
    def get_current_instance(cls) -> MessageHub:
        """The hub of the Runner that is being built or runs, for models and others that do not know their Runner.

        Outside of that it is a hub without a Runner.
        """
        current = MessageHub._current.get() or MessageHub._latest
        if current is None:
            current = MessageHub._latest = cls()
        return current

    @contextlib.contextmanager
    def as_current(self) -> Iterator[None]:
        """Make this the current instance while the block runs."""
        token, before = MessageHub._current.set(self), MessageHub._latest
        MessageHub._latest = self
        try:
            yield
        finally:
            MessageHub._current.reset(token)
            MessageHub._latest = before

    def update_scalar(self, key: str, value: float | Tensor, unless: Tensor | None = None) -> None:
        """Add a value to a scalar.

        Args:
            key: name of the scalar.
            value: a number, or a tensor of one element.
            unless: as for :meth:`HistoryBuffer.update`.

        Raises:
            ValueError: ``value`` is neither a number nor a tensor of one element.
        """
        buffer = self.log_scalars.get(key)
        if buffer is None:
            buffer = HistoryBuffer(self.window_size)
        try:
            buffer.update(value, unless)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} is logged as a number: {error}") from error
        self.log_scalars[key] = buffer

    def update_info(self, key: str, value: Any) -> None:
        """Set an entry of ``runtime_info``."""
        self.runtime_info[key] = value

    def pop_info(self, key: str, default: Any = None) -> Any:
        """Remove an entry of ``runtime_info`` and return it."""
        return self.runtime_info.pop(key, default)

    def get_scalar(self, key: str) -> HistoryBuffer:
        """The values of a scalar; KeyError if it was never updated."""
        if key not in self.log_scalars:
            raise KeyError(f"no scalar {key!r} was logged")
        return self.log_scalars[key]

    def get_info(self, key: str, default: Any = None) -> Any:
        """An entry of ``runtime_info``, or ``default``."""
        return self.runtime_info.get(key, default)

    def state_dict(self) -> dict[str, Any]:
        """All scalars, and the information that a checkpoint can hold; waits for the device."""
        infos = {key: portable(info) for key, info in self.runtime_info.items()}
        return {
            "log_scalars": {key: buffer.slots for key, buffer in self.log_scalars.items()},
            "runtime_info": {key: infos[key] for key in infos if not any(unloadable_parts(infos[key], key))},
        }

    def unsaved(self) -> dict[str, str]:
        """The information that :meth:`state_dict` leaves out, by name: the part that a checkpoint cannot hold."""
        parts = {key: next(unloadable_parts(portable(info), key), None) for key, info in self.runtime_info.items()}
        return {key: part for key, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state from :meth:`state_dict`; information that exists already keeps its type."""
        buffers = {key: HistoryBuffer(self.window_size, values) for key, values in state_dict["log_scalars"].items()}
        infos = {key: as_before(info, self.runtime_info.get(key)) for key, info in state_dict["runtime_info"].items()}
        self.log_scalars, self.runtime_info = buffers, infos
