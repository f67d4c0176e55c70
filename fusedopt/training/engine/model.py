"""BaseModel: the interface with which loops train and validate a model."""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import MODEL_WRAPPERS, MODELS
from ..wrappers import OptimWrapper
from .data import moved

__all__ = ["BaseDataPreprocessor", "BaseModel", "MMDistributedDataParallel", "MMSeparateDistributedDataParallel"]


@MODELS.register_module()
class BaseDataPreprocessor(nn.Module):
    """Moves a batch to the model's device; subclass it to also normalize, stack or augment.

    Args:
        non_blocking: let the host not wait for the copy; later work on the device does.
    """

    def __init__(self, non_blocking: bool = True):
        super().__init__()
        self.non_blocking = non_blocking
        self._place: Tensor
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def forward(self, data: Any, training: bool = False) -> Any:
        """``data`` on the device of the model."""
        return moved(data, self._place.device, self.non_blocking)


class BaseModel(nn.Module, abc.ABC):
    """A model that a :class:`Runner` can train, as ``mmengine.model.BaseModel``.

    Args:
        data_preprocessor: processes each batch first, as ``data_preprocessor(data, training)``: a module or its
            config; by default a :class:`BaseDataPreprocessor`.
        init_cfg: must be None; MMEngine's initializers are not supported.

    Raises:
        ValueError: ``init_cfg`` is given.
    """

    def __init__(self, data_preprocessor: nn.Module | Mapping[str, Any] | None = None, init_cfg: Any = None):
        super().__init__()
        if init_cfg:
            raise ValueError(
                f"Invalid init_cfg: {init_cfg!r}; expected None. Initialize the weights in __init__, or load them with "
                "the Runner's load_from"
            )
        if isinstance(data_preprocessor, Mapping):
            data_preprocessor = MODELS.build({"type": "BaseDataPreprocessor", **data_preprocessor})
        self.data_preprocessor: Any = BaseDataPreprocessor() if data_preprocessor is None else data_preprocessor

    @abc.abstractmethod
    def forward(self, *args: Any, mode: str = "tensor", **kwargs: Any) -> Any:
        """Process a batch, whose entries are the arguments.

        Args:
            mode: what to return. ``'loss'``: a dict of losses by name, tensors or lists of tensors; those whose name
                contains ``loss`` are added up. ``'predict'``: a list with one prediction for each sample.
                ``'tensor'``: anything.
        """

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Run one training iteration; return the values to log."""
        return _train_step(self, self, data, optim_wrapper)

    def val_step(self, data: Any) -> list[Any]:
        """The predictions for a batch."""
        return _run_forward(self, self.data_preprocessor(data, False), mode="predict")

    def test_step(self, data: Any) -> list[Any]:
        """The predictions for a batch."""
        return self.val_step(data)

    def parse_losses(self, losses: Mapping[str, Tensor | Sequence[Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the values to log: the mean of each entry, and the loss as ``loss`` if no entry has that name.

        Raises:
            TypeError: an entry is neither a tensor nor a list of tensors, or ``losses`` is not a dict.
            ValueError: no entry's name contains ``loss``.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(f"forward(mode='loss') must return a dict of losses, got {type(losses).__name__}")
        log_vars: dict[str, Tensor] = {}
        for name, value in losses.items():
            if isinstance(value, Tensor):
                log_vars[name] = value.mean()
            elif isinstance(value, Sequence) and value and all(isinstance(item, Tensor) for item in value):
                log_vars[name] = _total([item.mean() for item in value])
            else:
                raise TypeError(f"loss {name!r} must be a tensor or a list of tensors, got {value!r}")
        parts = [value for name, value in log_vars.items() if "loss" in name]
        if not parts:
            names = ", ".join(map(repr, log_vars)) or "no losses"
            raise ValueError(f"expected a name that contains 'loss', got {names}")
        loss = _total(parts)
        return loss, {name: value.detach() for name, value in {"loss": loss, **log_vars}.items()}


def _total(parts: list[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _run_forward(model: nn.Module, data: Any, mode: str) -> Any:
    """Call ``model`` with the entries of a batch as its arguments."""
    if isinstance(data, Mapping):
        return model(**data, mode=mode)
    if isinstance(data, (list, tuple)):
        return model(*data, mode=mode)
    raise TypeError(f"a batch must be a dict, a list or a tuple, got {type(data).__name__}")


def _train_step(model: BaseModel, wrapped: nn.Module, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
    """One training iteration of ``model``, with the forward pass of ``wrapped``."""
    with optim_wrapper.optim_context(wrapped):
        losses = _run_forward(wrapped, model.data_preprocessor(data, True), mode="loss")
    loss, log_vars = model.parse_losses(losses)
    optim_wrapper.update_params(loss)
    return log_vars


@MODEL_WRAPPERS.register_module()
class MMDistributedDataParallel(nn.parallel.DistributedDataParallel):
    """``torch.nn.parallel.DistributedDataParallel`` of a :class:`BaseModel`, with the same interface.

    Args:
        module: the model.
        kwargs: torch's arguments.

    Raises:
        TypeError: ``module`` is not a :class:`BaseModel`: its ``train_step`` could bypass the averaging of gradients.
    """

    module: BaseModel

    def __init__(self, module: nn.Module, **kwargs: Any):
        if not isinstance(module, BaseModel):
            raise TypeError(
                f"several processes can only train a BaseModel, whose forward(mode='loss') returns the losses; "
                f"{type(module).__name__} is not one"
            )
        with _buffers_stay_as_they_are():
            super().__init__(module, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """As :meth:`BaseModel.train_step`, with the gradients averaged over all processes."""
        return _train_step(self.module, self, data, optim_wrapper)

    def val_step(self, data: Any) -> list[Any]:
        """As :meth:`BaseModel.val_step`."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list[Any]:
        """As :meth:`BaseModel.test_step`."""
        return self.module.test_step(data)


@contextlib.contextmanager
def _buffers_stay_as_they_are() -> Iterator[None]:
    """Keep quiet torch's warning that ``broadcast_buffers`` has a new name, which came with torch 2.13.

    ``forward_sync_buffers=False`` is not the same: it still copies the buffers of the first process at the start.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        yield


@MODEL_WRAPPERS.register_module()
class MMSeparateDistributedDataParallel(nn.Module):
    """Wraps each part of a model in a ``DistributedDataParallel`` of its own, as MMEngine's class of this name.

    For models like GANs, whose ``train_step`` steps the optimizers of its parts in turns. Parts are the first-level
    modules with a parameter that is not frozen; parameters of the model itself are not averaged over the processes.

    Args:
        module: the model, whose ``train_step`` does the iteration. Its parts are replaced by the wrapped ones.
        broadcast_buffers, find_unused_parameters, kwargs: as for ``torch.nn.parallel.DistributedDataParallel``.
    """

    module: Any

    def __init__(
        self, module: nn.Module, broadcast_buffers: bool = False, find_unused_parameters: bool = False, **kwargs: Any
    ):
        super().__init__()
        self.module = module
        settings = {"broadcast_buffers": broadcast_buffers, "find_unused_parameters": find_unused_parameters, **kwargs}
        for name, part in list(module.named_children()):
            if any(param.requires_grad for param in part.parameters()):
                with _buffers_stay_as_they_are():
                    module._modules[name] = nn.parallel.DistributedDataParallel(part, **settings)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """The model's, in which each wrapped part averages its gradients over all processes."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list[Any]:
        """As the model's."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list[Any]:
        """As the model's."""
        return self.module.test_step(data)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, no part averages its gradients."""
        with contextlib.ExitStack() as stack:
            for part in self.module.children():
                if isinstance(part, nn.parallel.DistributedDataParallel):
                    stack.enter_context(part.no_sync())
            yield
