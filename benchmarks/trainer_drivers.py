"""Who trains in benchmarks/trainers.py: the same parameters with the same gradients under each trainer.

The trainers' packages are imported when a driver is made.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.bench.cases import Case
from fusedopt.bench.contenders import initial_tensors

from .torchvision_beside import make_torchvision_importable

__all__ = ["DRIVERS", "Clock", "Driver"]

MAX_NORM = 1.0
SCALE = 1024.0


class Clock:
    """Seconds from the end of a backward pass until the trainer has stepped."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def start(self) -> None:
        self._begin = time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self._begin)

    def stopped_by(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, after which the clock stops."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.stop()
            return result

        return timed


class _Given(torch.autograd.Function):
    """A loss whose gradients are given, times that of the loss."""

    @staticmethod
    def forward(ctx: Any, net: Net, *params: Tensor) -> Tensor:
        ctx.net = net
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:  # type: ignore[override]
        torch.autograd.Variable._execution_engine.queue_callback(ctx.net.clock.start)
        return None, *(gradient * factor for gradient in ctx.net.gradients)


class Net(nn.Module):
    """The parameters of a case, and nothing to compute but their gradients."""

    def __init__(self, case: Case):
        super().__init__()
        self.clock = Clock()
        self.gradients: list[Tensor] = []
        self.names: dict[str, str] = {}
        for name, value, gradient in initial_tensors(case):
            self.names[name] = name.replace(".", "_")
            self.register_parameter(self.names[name], nn.Parameter(value.clone()))
            self.gradients.append(gradient)

    def forward(self, index: Any = None) -> dict[str, Tensor]:
        return {"loss": _Given.apply(self, *self.parameters())}


class Driver:
    """One training under a trainer.

    Args:
        case: the parameters and their groups.
        fused: by ours under the integration, rather than by torch's fused AdamW.
    """

    package: ClassVar[str]
    title: ClassVar[str]
    #: What torch's optimizer is made with.
    stock: ClassVar[dict[str, Any]] = {"fused": True}

    def __init__(self, case: Case, fused: bool):
        self.net, self.fused = Net(case), fused
        params = [[self.net.get_parameter(self.net.names[name]) for name in group] for group in case.groups]
        groups = [{"params": each, **case.settings(names)} for each, names in zip(params, case.groups, strict=True)]
        self.optimizer: torch.optim.Optimizer = (
            fusedopt.FusedAdamW(groups) if fused else torch.optim.AdamW(groups, **self.stock)
        )
        self.make()

    def make(self) -> None:
        """Whatever is made once."""

    def run(self, steps: int) -> None:
        """Train so many steps; the net's clock notes them."""
        raise NotImplementedError

    def seconds(self, steps: int) -> list[float]:
        """Of each of so many steps."""
        self.net.clock.seconds.clear()
        self.run(steps)
        return list(self.net.clock.seconds)


class Lightning(Driver):
    """A Trainer, which clips by norm."""

    package, title = "lightning", "Lightning, 32-true"

    def trainer_settings(self) -> dict[str, Any]:
        return {}

    def run(self, steps: int) -> None:
        import lightning

        net, optimizer = self.net, self.optimizer

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch: Any, index: int) -> Tensor:
                return self.net()["loss"]

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return optimizer

        callbacks = []
        if self.fused:
            from fusedopt.integrations.lightning import FusedClipping

            callbacks = [FusedClipping()]
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            gradient_clip_val=MAX_NORM,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **self.trainer_settings(),
        )
        trainer.strategy.optimizer_step = net.clock.stopped_by(trainer.strategy.optimizer_step)
        trainer.fit(Module(), torch.utils.data.DataLoader(range(steps), batch_size=None))


class LightningHalf(Lightning):
    """With a loss scaler. Lightning refuses torch's fused optimizers here, so it is timed with torch's default."""

    title, stock = "Lightning, 16-mixed", {}

    def make(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def trainer_settings(self) -> dict[str, Any]:
        from lightning.pytorch.plugins import MixedPrecision

        return {"plugins": [MixedPrecision("16-mixed", "cpu", self.scaler)]}


class Fabric(Driver):
    """A loop under Fabric."""

    package, title = "lightning", "Fabric, 32-true"

    def make(self) -> None:
        from lightning.fabric import Fabric

        self.fabric = Fabric(accelerator="cpu")
        if self.fused:
            from fusedopt.integrations.lightning import fuse

            fuse(self.fabric)
        self.model, self.outer = self.fabric.setup(self.net, self.optimizer)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.fabric.backward(self.model()["loss"])
            self.fabric.clip_gradients(self.model, self.outer, max_norm=MAX_NORM, error_if_nonfinite=False)
            self.outer.step()
            self.net.clock.stop()
            self.outer.zero_grad()


class Accelerate(Driver):
    """A loop under accelerate."""

    package, title = "accelerate", "accelerate, no mixed precision"

    def make(self) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.prepare_for_fp16()
        if self.fused:
            from fusedopt.integrations.accelerate import fuse

            fuse(self.accelerator)
        self.model, self.outer = self.accelerator.prepare(self.net, self.optimizer)

    def prepare_for_fp16(self) -> None:
        """Nothing to do."""

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.accelerator.backward(self.model()["loss"])
            self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.outer.step()
            self.net.clock.stop()
            self.outer.zero_grad()


class Transformers(Driver):
    """The Trainer, which clips by norm and logs it."""

    package, title, max_norm = "transformers", "transformers, clipped", MAX_NORM

    def make(self) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        clock = self.net.clock

        class Stop(TrainerCallback):
            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                clock.stop()

        self.folder = tempfile.TemporaryDirectory()
        self.arguments = functools.partial(
            TrainingArguments,
            output_dir=self.folder.name,
            use_cpu=True,
            per_device_train_batch_size=1,
            max_grad_norm=self.max_norm,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = functools.partial(Trainer, model=self.net, callbacks=[Stop()])

    def run(self, steps: int) -> None:
        constant = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        trainer = self.trainer(
            args=self.arguments(max_steps=steps),
            train_dataset=[{"index": index} for index in range(steps)],
            optimizers=(self.optimizer, constant),
        )
        if self.fused:
            from fusedopt.integrations.transformers import fuse

            fuse(trainer)
        with contextlib.redirect_stdout(io.StringIO()):  # its log
            trainer.train()


class TransformersUnclipped(Transformers):
    """The Trainer takes the norm for its log all the same."""

    title, max_norm = "transformers, not clipped", 0.0


class Timm(Driver):
    """A loop with timm's NativeScaler."""

    package, title = "timm", "timm, NativeScaler"

    def make(self) -> None:
        make_torchvision_importable()
        from timm.utils import NativeScaler

        self.scaler = NativeScaler(device="cpu")
        if self.fused:
            from fusedopt.integrations.timm import fuse

            fuse(self.scaler)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.scaler(self.net()["loss"], self.optimizer, clip_grad=MAX_NORM, parameters=self.net.parameters())
            self.net.clock.stop()
            self.optimizer.zero_grad()


#: By the title of each.
DRIVERS: dict[str, type[Driver]] = {
    kind.title: kind
    for kind in (Lightning, LightningHalf, Fabric, Accelerate, Transformers, TransformersUnclipped, Timm)
}
