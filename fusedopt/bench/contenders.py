"""The optimizers that are compared: ours, and all of torch's implementations."""

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

#: The base of the ratios, and the contender that the required speed-ups refer to.
OURS, RIVAL = "fusedopt", "torch-fused"


def initial_tensors(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, parameter, gradient) of each tensor of a case, the same for every contender.

    Parameters are small, as after initialization. Gradients are those of one micro-batch, scaled if the recipe has AMP,
    and large enough not to underflow in fp16 state.
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
    """One optimizer with its own parameters, and everything that happens between backward and the next batch.

    Args:
        case: the case to run.
        gradients: those of one micro-batch, by name; not changed.

    Attributes:
        params: the parameters by name.
    """

    #: Shown by ``--list``.
    description: ClassVar[str]
    #: Whether results may differ by more than rounding, as with 8-bit state.
    approximate: ClassVar[bool] = False
    #: Whether a step writes to the gradients, which are then restored before the next step.
    writes_gradients: ClassVar[bool] = True

    def __init__(self, case: Case, gradients: dict[str, Tensor]):
        self.case = case
        self.recipe = RECIPES[case.recipe]
        self.params = self.make_params()
        for name, param in self.params.items():
            if gradients[name].dtype != param.dtype:
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
        """The argument with which fused optimizers and wrappers clip as the recipe says."""
        return None if self.max_norm is None else {"max_norm": self.max_norm}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        """Why it cannot run this case, or None."""
        return None

    @classmethod
    def bytes_moved(cls, case: Case) -> float:
        """Bytes for each parameter that two passes have to move: what its speed is compared with."""
        return case.bytes_per_parameter

    def make_params(self) -> dict[str, nn.Parameter]:
        """The parameters by name, with their initial values."""
        return {name: nn.Parameter(value) for name, value, _ in initial_tensors(self.case)}

    def whole(self, name: str) -> Tensor:
        """A parameter as a plain tensor."""
        return self.params[name].detach()

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer."""
        raise NotImplementedError

    def make_scaler(self) -> torch.amp.GradScaler:
        """The gradient scaler, disabled in a recipe without AMP."""
        return torch.amp.GradScaler(self.case.device, init_scale=SCALE, enabled=self.recipe.amp)

    def set_gradients(self, factor: float = 1.0) -> None:
        """Set the gradients to those of one micro-batch, times ``factor``."""
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
        """The timed part: adding the other micro-batches' gradients, and the step."""
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
    """The fused optimizer in a wrapper, as built from an MMEngine-style config."""

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
    """A torch optimizer, or one used like it: the scaler unscales, torch.nn.utils clips, the scaler steps."""

    flags: ClassVar[dict[str, Any]] = {}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if case.dtype == "fp16" and RECIPES[case.recipe].amp:
            return "torch's GradScaler does not unscale gradients of fp16 parameters"
        return None

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return getattr(torch.optim, OPTIMIZERS[self.case.optimizer].name)(groups, **self.flags)

    def cast_gradients(self) -> None:
        """Cast the gradients to the dtype of their parameters, which torch's optimizers require."""
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

    description = "torch, fused=True: required speed-ups refer to it"
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


#: Contenders by their names on the command line; the suite in benchmarks/ adds more.
CONTENDERS: dict[str, type[Contender]] = {
    OURS: Fused,
    "fusedopt-wrapper": FusedWrapper,
    **{f"{OURS}-{backend}": OnBackend.of(backend) for backend in BACKENDS},
    RIVAL: TorchFused,
    "torch-foreach": Foreach,
    "torch-for-loop": ForLoop,
    "torch-compiled": Compiled,
}
