"""Optimizers of other packages, with the settings that make them torch's; each takes part when it is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from typing import Any, ClassVar

import torch

from fusedopt.bench.cases import OPTIMIZERS, SCALE, Case
from fusedopt.bench.contenders import CONTENDERS, RIVAL, Stock

__all__ = ["Peer"]


class Peer(Stock):
    """An optimizer of another package, driven as a torch optimizer."""

    module: ClassVar[str]
    #: Keys of ``OPTIMIZERS`` that the package computes as torch does, to the name of its class.
    classes: ClassVar[dict[str, str]]
    #: Arguments that make the class compute what torch's does.
    equal: ClassVar[dict[str, Any]] = {}
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    #: Where the package's classes are, if not in ``module``.
    place: ClassVar[str | None] = None

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if importlib.util.find_spec(cls.module) is None:
            return f"the package {cls.module} is not installed"
        if case.device not in cls.devices:
            return f"needs {' or '.join(cls.devices)}"
        if case.optimizer not in cls.classes:
            return f"{cls.module} has no {case.optimizer} equal to torch's"
        return super().unavailable(case)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(sys.stderr):  # some announce themselves
            found = getattr(importlib.import_module(self.place or self.module), self.classes[self.case.optimizer])
            return found(groups, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Of the constructor, beside the groups."""
        settings = OPTIMIZERS[self.case.optimizer].settings
        common = {} if self.case.optimizer == "sgd" else {"betas": (0.9, 0.999), "eps": settings["eps"]}
        return {"lr": settings["lr"], **common, **self.equal}


class DeepSpeed(Peer):
    """Compiles its kernels with the first optimizer, which takes minutes; needs a compiler and ninja on PATH."""

    description = "DeepSpeed's DeepSpeedCPUAdam"
    module, place = "deepspeed", "deepspeed.ops.adam"
    classes: ClassVar[dict[str, str]] = {"adam": "DeepSpeedCPUAdam", "adamw": "DeepSpeedCPUAdam"}
    devices = ("cpu",)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return super().build(groups)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "adamw_mode": self.case.optimizer == "adamw", "bias_correction": True}


class Optimi(Peer):
    """Leaves the compensation of 16-bit parameters off, which torch's optimizers do not have."""

    description = "torch-optimi"
    module = "optimi"
    classes: ClassVar[dict[str, str]] = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
    equal: ClassVar[dict[str, Any]] = {"decouple_lr": False, "kahan_sum": False}

    def arguments(self) -> dict[str, Any]:
        own = {} if self.case.optimizer == "adamw" else {"decouple_wd": False}
        if self.case.optimizer == "sgd":
            own["dampening"] = False
        return {**super().arguments(), **own}


class TorchAO(Peer):
    """Compiles a step for each shape."""

    description = "torchao's 32-bit AdamW"
    module, place = "torchao", "torchao.optim"
    classes: ClassVar[dict[str, str]] = {"adamw": "_AdamW", "amsgrad": "_AdamW"}

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "amsgrad": self.case.optimizer == "amsgrad"}


class TorchAO8bit(TorchAO):
    """Its state is quantized, so its results are near torch's rather than equal."""

    description = "torchao's 8-bit AdamW (state quantized)"
    approximate = True
    classes: ClassVar[dict[str, str]] = {"adamw": "AdamW8bit"}

    def arguments(self) -> dict[str, Any]:
        return Peer.arguments(self)


class BitsAndBytes(Peer):
    """Its Adam decays as AdamW does, so only AdamW and SGD are torch's."""

    description = "bitsandbytes' 32-bit optimizers"
    module, place = "bitsandbytes", "bitsandbytes.optim"
    classes: ClassVar[dict[str, str]] = {"sgd": "SGD32bit", "adamw": "AdamW32bit"}

    def arguments(self) -> dict[str, Any]:
        momentum = {"momentum": 0.9} if self.case.optimizer == "sgd" else {}
        return {**super().arguments(), **momentum}


class BitsAndBytes8bit(BitsAndBytes):
    """Its state is quantized, so its results are near torch's rather than equal."""

    description = "bitsandbytes' 8-bit optimizers (state quantized)"
    approximate = True
    classes: ClassVar[dict[str, str]] = {"sgd": "SGD8bit", "adamw": "AdamW8bit"}


class FlashOptim(Peer):
    """Without quantization, which would need CUDA; on a CPU it runs its fallback."""

    description = "FlashOptim, not quantized"
    module = "flashoptim"
    classes: ClassVar[dict[str, str]] = {"sgd": "FlashSGD", "adam": "FlashAdam", "adamw": "FlashAdamW"}

    def arguments(self) -> dict[str, Any]:
        own: dict[str, Any] = {"quantize": False, "master_weight_bits": None, "fused": self.case.device == "cuda"}
        if self.case.optimizer == "sgd":
            own["momentum"] = 0.9
        elif self.case.optimizer == "adamw":
            own["decouple_lr"] = False
        return {**super().arguments(), **own}


class Apex(Peer):
    """NVIDIA's, built from source: the package of that name in the Python index is something else."""

    description = "NVIDIA apex's multi-tensor optimizers"
    module, place = "apex", "apex.optimizers"
    classes: ClassVar[dict[str, str]] = {"sgd": "FusedSGD", "adam": "FusedAdam", "adamw": "FusedAdam"}
    devices = ("cuda",)

    def arguments(self) -> dict[str, Any]:
        sgd = self.case.optimizer == "sgd"
        own: dict[str, Any] = {"momentum": 0.9} if sgd else {"adam_w_mode": self.case.optimizer == "adamw"}
        return {**super().arguments(), **own}


class MMEngine(Stock):
    """Where a user of MMEngine starts from."""

    description = "mmengine's OptimWrapper or AmpOptimWrapper around torch, fused=True"
    flags: ClassVar[dict[str, Any]] = {"fused": True}

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        for module in ("mmengine", "cv2"):
            if importlib.util.find_spec(module) is None:
                return f"the package {module} is not installed"
        if case.dtype.endswith("-grads"):
            return "mmengine's wrappers do not cast gradients"
        return super().unavailable(case)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from mmengine.optim import AmpOptimWrapper, OptimWrapper

        optimizer = super().build(groups)
        if not self.recipe.amp:
            self.wrapper = OptimWrapper(optimizer, clip_grad=self.clip_grad)
            return optimizer

        class AnyDevice(AmpOptimWrapper):
            """The original's constructor refuses a CPU, and would disable its scaler there; the rest is unchanged."""

            def __init__(self, scaler: torch.amp.GradScaler, **kwargs: Any):
                OptimWrapper.__init__(self, **kwargs)
                self._scale_update_param, self.loss_scaler, self.cast_dtype = None, scaler, None

        scaler = torch.amp.GradScaler(self.case.device, init_scale=SCALE)
        scaler.scale(torch.zeros((), device=self.case.device))
        self.wrapper = AnyDevice(scaler, optimizer=optimizer, clip_grad=self.clip_grad)
        return optimizer

    def step(self) -> None:
        self.wrapper.step()


CONTENDERS.update(
    {
        f"mmengine-{RIVAL}": MMEngine,
        "deepspeed": DeepSpeed,
        "optimi": Optimi,
        "torchao": TorchAO,
        "torchao-8bit": TorchAO8bit,
        "bitsandbytes": BitsAndBytes,
        "bitsandbytes-8bit": BitsAndBytes8bit,
        "flashoptim": FlashOptim,
        "apex": Apex,
    }
)
