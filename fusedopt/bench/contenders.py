"""The optimizers that are compared: ours, and torch's in all its ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fusedopt

from ..amp import GradScaler
from ..backends import BACKENDS
from .cases import DTYPES, OPTIMIZERS, RECIPES, SCALE, Case

__all__ = ["CONTENDERS", "OURS", "RIVAL", "Contender", "initial_tensors"]

#: The contender that ratios are of, and the one that floors are against.
OURS, RIVAL = "fusedopt", "torch-fused"


def initial_tensors(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter, gradient) of each tensor of a case, the same for every contender.

    Parameters are small, as after initialization. Gradients are of one micro-batch, scaled where the recipe has AMP,
    and of a magnitude that no state of fp16 loses to underflow.
    """
    recipe = RECIPES[case.recipe]
    factor = (SCALE if recipe.amp else 1.0) / recipe.accumulate
    param_dtype, grad_dtype = DTYPES[case.dtype]
    generator = torch.Generator(device=case.device)
    for index, (name, shape) in enumerate(case.shapes.items()):
        generator.manual_seed(index)
        param = torch.randn(shape, generator=generator, device=case.device).mul_(0.02)
        grad = torch.randn(shape, generator=generator, device=case.device)
        grad = grad.add_(grad.sign(), alpha=0.5).mul_(factor)
        yield name, param.to(param_dtype), grad.to(grad_dtype)


class Contender:
    """One optimizer on parameters of its own, with all that a training does between backward and the next batch.

    Args:
        case: what to step through.
        gradients: of one micro-batch, by name; not changed.

    Attributes:
        params: by name.
    """

    #: Shown by ``--list``.
    description: ClassVar[str]
    #: Tells apart results that may differ by more than rounding, such as those of an 8-bit state.
    approximate: ClassVar[bool] = False
    #: Whether a step writes into the gradients, which then are restored before the next one.
    writes_gradients: ClassVar[bool] = True

    def __init__(self, case: Case, gradients: dict[str, Tensor]):
        self.case = case
        self.recipe = RECIPES[case.recipe]
        self.params: dict[str, nn.Parameter] = {}
        for name, value, _ in initial_tensors(case):
            self.params[name] = param = nn.Parameter(value)
            if gradients[name].dtype != value.dtype:
                param.grad_dtype = None  # takes a gradient of any dtype
            param.grad = gradients[name].clone()
        self._grads: list[Tensor] = [param.grad for param in self.params.values() if param.grad is not None]
        self._originals = [gradients[name] for name in self.params]
        self.max_norm = case.max_norm if self.recipe.clip else None
        self.optimizer = self.build(
            [{"params": [self.params[name] for name in group], **case.settings(group)} for group in case.groups]
        )
        self.scaler = self.make_scaler()
        self.scaler.scale(torch.zeros((), device=case.device))

    @property
    def clip_grad(self) -> dict[str, float] | None:
        """What fused optimizers and wrappers take to clip as the recipe says."""
        return None if self.max_norm is None else {"max_norm": self.max_norm}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        """Why it cannot take part, or None."""
        return None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        raise NotImplementedError

    def make_scaler(self) -> torch.amp.GradScaler:
        """The gradient scaler, disabled in a recipe without AMP."""
        return torch.amp.GradScaler(self.case.device, init_scale=SCALE, enabled=self.recipe.amp)

    def set_gradients(self, factor: float = 1.0) -> None:
        """Leave in the gradients what one micro-batch's backward leaves there, times ``factor``."""
        for param, grad in zip(self.params.values(), self._grads, strict=True):
            param.grad = grad
        torch._foreach_copy_(self._grads, self._originals)
        if factor != 1:
            torch._foreach_mul_(self._grads, factor)

    def prepare(self) -> None:
        """Undo what the last step did to the gradients; not timed."""
        if self.writes_gradients or self.recipe.accumulate > 1:
            self.set_gradients()

    def __call__(self) -> None:
        """The timed part: the further micro-batches' gradients, and the step."""
        for _ in range(self.recipe.accumulate - 1):
            torch._foreach_add_(self._grads, self._originals)
        self.step()

    def step(self) -> None:
        """Unscale, clip, update the parameters and the scale."""
        raise NotImplementedError


class Fused(Contender):
    """Everything inside one step."""

    writes_gradients = False
    description = "fusedopt's optimizer and GradScaler"
    backend = "auto"

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        cls = getattr(fusedopt, f"Fused{OPTIMIZERS[self.case.optimizer].name}")
        return cls(groups, clip_grad=self.clip_grad, backend=self.backend)

    def make_scaler(self) -> GradScaler:
        return GradScaler(self.case.device, init_scale=SCALE, enabled=self.recipe.amp)

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


class OnBackend(Fused):
    """One backend by name."""

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        return BACKENDS[cls.backend].unavailable(torch.device(case.device))

    @classmethod
    def of(cls, backend: str) -> type[OnBackend]:
        """The contender of one backend."""
        about = {"backend": backend, "description": f"fusedopt on its {backend} backend"}
        return type(f"On{backend.title()}", (cls,), about)


class FusedWrapper(Fused):
    """What a config of MMEngine's kind makes of the fused optimizer."""

    description = "fusedopt's OptimWrapper or AmpOptimWrapper around the fused optimizer"

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        cls = getattr(fusedopt, f"Fused{OPTIMIZERS[self.case.optimizer].name}")
        if self.recipe.amp:
            amp = fusedopt.AmpOptimWrapper({"init_scale": SCALE}, optimizer=cls(groups), clip_grad=self.clip_grad)
            amp.loss_scaler.scale(torch.zeros((), device=self.case.device))
            self.wrapper: fusedopt.OptimWrapper = amp
        else:
            self.wrapper = fusedopt.OptimWrapper(cls(groups), clip_grad=self.clip_grad)
        return self.wrapper.optimizer

    def step(self) -> None:
        self.wrapper.step()


class Stock(Contender):
    """A torch optimizer, or one that is used as such: the scaler unscales, torch.nn.utils clips, the scaler steps."""

    flags: ClassVar[dict[str, Any]] = {}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if case.dtype == "fp16" and RECIPES[case.recipe].amp:
            return "torch's GradScaler does not unscale gradients of fp16 parameters"
        return None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return getattr(torch.optim, OPTIMIZERS[self.case.optimizer].name)(groups, **self.flags)

    def cast_gradients(self) -> None:
        """Give the gradients the dtype of their parameters, without which torch's optimizers do not take them."""
        if self.case.dtype.endswith("-grads"):
            for param in self.params.values():
                param.grad = param.grad.to(param.dtype)  # type: ignore[union-attr]

    def step(self) -> None:
        self.cast_gradients()
        if self.max_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params.values(), self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class ForLoop(Stock):
    """A loop over parameters."""

    description = "torch, foreach=False: the reference"
    flags: ClassVar[dict[str, Any]] = {"foreach": False, "fused": False}


class Foreach(Stock):
    """Multi-tensor operations."""

    description = "torch, foreach=True"
    flags: ClassVar[dict[str, Any]] = {"foreach": True}


class TorchFused(Stock):
    """torch's own fused kernels."""

    description = "torch, fused=True: what floors are against"
    flags: ClassVar[dict[str, Any]] = {"fused": True}


class Compiled(Stock):
    """torch.compile of the optimizer's step; compiling takes seconds to minutes, and is not timed."""

    description = "torch.compile of the foreach step"
    flags: ClassVar[dict[str, Any]] = {"foreach": True}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if len(case.shapes) > 500:
            return "torch.compile takes many minutes for so many tensors"
        return super().unavailable(case)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = super().build(groups)
        torch._dynamo.reset()
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[assignment, method-assign]
        return optimizer


#: By the names that a user types; the suite in benchmarks/ adds more.
CONTENDERS: dict[str, type[Contender]] = {
    OURS: Fused,
    "fusedopt-wrapper": FusedWrapper,
    **{f"{OURS}-{backend}": OnBackend.of(backend) for backend in BACKENDS},
    RIVAL: TorchFused,
    "torch-foreach": Foreach,
    "torch-for-loop": ForLoop,
    "torch-compiled": Compiled,
}
