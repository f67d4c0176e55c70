"""accelerate: its Accelerator drives fused optimizers, and their steps unscale and clip."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import pickle
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import INF
from probe import GradientPasses
from torch import nn

import fusedopt
from fusedopt.amp import GradScaler

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fusedopt[accelerate]'")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from fusedopt.integrations.accelerate import FusedAcceleratedOptimizer, fuse, unfuse  # noqa: E402

OVERFLOW = 7
PRECISIONS = ["no", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps one state for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator_of(precision: str = "no", **settings: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, **settings)
    if precision == "fp16":  # accelerate makes a scaler on accelerators only
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
        accelerator.native_amp = True
    return accelerator


class Model(nn.Sequential):
    """In float32 under autocast, too, whose rounding turns the last bit of a parameter into a thousandth."""

    autocast = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return super().forward(x)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return Model(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch_of(step: int, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(step))


# With so large an eps, a gradient that is nearly zero does not turn its rounding error into a step of full length.
def stock_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.002, eps=1e-3, weight_decay=0.1, foreach=False, fused=False)


def fused_adamw(params: Any) -> torch.optim.Optimizer:
    return fusedopt.FusedAdamW(params, lr=0.002, eps=1e-3, weight_decay=0.1)


class Run:
    """A model, its optimizer and a scheduler, prepared."""

    def __init__(self, fused: bool, precision: str = "no", *, after: bool = False, **settings: Any):
        self.accelerator = accelerator_of(precision, **settings)
        model = model_of()
        optimizer = (fused_adamw if fused else stock_adamw)(model.parameters())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
        if fused and not after:
            assert fuse(self.accelerator) is self.accelerator
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        if fused and after:
            fuse(self.accelerator)
        self.inner = optimizer
        self.norms: list[Any] = []
        self.rates: list[float] = []
        self.skipped: list[bool] = []
        self.passes: list[str] = []

    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def backward(self, step: int) -> None:
        loss = self.model(batch_of(step)).float().square().mean()
        self.accelerator.backward(loss * (1e38 if step == OVERFLOW and self.accelerator.scaler else 1.0))

    def step(self, step: int, clip: Callable[[Any], Any] | None = None) -> None:
        self.backward(step)
        with GradientPasses(self.params()) as passes:
            norm = None if clip is None else clip(self)
            self.optimizer.step()
        self.passes += passes.seen
        self.norms.append(norm)
        self.skipped.append(self.accelerator.optimizer_step_was_skipped)
        assert self.skipped[-1] == self.optimizer.step_was_skipped
        self.scheduler.step()
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()

    def train(self, steps: range, clip: Callable[[Any], Any] | None = None) -> Run:
        for step in steps:
            self.step(step, clip)
        return self


def norm_clip(max_norm: float, norm_type: float = 2.0) -> Callable[[Run], Any]:
    return lambda run: run.accelerator.clip_grad_norm_(run.model.parameters(), max_norm, norm_type)


def value_clip(run: Run) -> None:
    run.accelerator.clip_grad_value_(run.model.parameters(), 0.05)


CLIPS: dict[str, Any] = {
    "none": None,
    "norm": norm_clip(0.3),
    "norm_1": norm_clip(0.5, 1.0),
    "norm_inf": norm_clip(0.1, INF),
    "report": norm_clip(INF),
    "value": value_clip,
}


def assert_same(ours: Any, theirs: Any) -> None:
    for param, want in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)


def assert_norms(ours: list[Any], theirs: list[Any]) -> None:
    for norm, want in zip(ours, theirs, strict=True):
        assert (norm is None) == (want is None)
        if want is not None:
            assert isinstance(norm, torch.Tensor)
            torch.testing.assert_close(norm.clone(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("after", [False, True])
def test_trains_as_the_stock_optimizer_without_a_pass(precision: str, clip: str, after: bool) -> None:
    """20 steps; in fp16 with an overflow, and with a scale that grows."""
    stock = Run(False, precision).train(range(20), CLIPS[clip])
    ours = Run(True, precision, after=after).train(range(20), CLIPS[clip])
    assert_same(ours, stock)
    assert_norms(ours.norms, stock.norms)
    assert ours.skipped == stock.skipped
    assert ours.rates == stock.rates
    assert ours.skipped == [step == OVERFLOW and precision == "fp16" for step in range(20)]
    assert ours.passes == [] and stock.passes != []
    if precision == "fp16":
        assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale() > 2**8
    assert isinstance(ours.optimizer, FusedAcceleratedOptimizer)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_under_autocast(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "autocast", True)
    stock, ours = Run(False, "fp16").train(range(20), CLIPS[clip]), Run(True, "fp16").train(range(20), CLIPS[clip])
    assert ours.skipped == stock.skipped and ours.passes == []
    for param, want in zip(ours.params(), stock.params(), strict=True):
        torch.testing.assert_close(param, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_other_optimizers(kind: str) -> None:
    runs = []
    for cls, settings in (
        ((torch.optim.SGD, fusedopt.FusedSGD), dict(momentum=0.9)),
        ((torch.optim.Adam, fusedopt.FusedAdam), dict(amsgrad=True, eps=1e-3)),
    )[kind == "adam" : 1 + (kind == "adam")]:
        for each in cls:
            run = Run.__new__(Run)
            run.accelerator = fuse(accelerator_of("fp16"))
            model = model_of()
            run.inner = each(model.parameters(), lr=0.002, foreach=False, **settings)
            scheduler = torch.optim.lr_scheduler.LinearLR(run.inner, 1.0, 0.1, 20)
            run.model, run.optimizer, run.scheduler = run.accelerator.prepare(model, run.inner, scheduler)
            run.norms, run.rates, run.skipped, run.passes = [], [], [], []
            runs.append(run.train(range(20), CLIPS["norm"]))
    assert_same(*runs)
    assert runs[0].passes != [] and runs[1].passes == []
    assert sum(runs[1].skipped) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("every", [False, True])
def test_accumulation(precision: str, clip: str, every: bool) -> None:
    """`every`: clips in each micro-batch, which accelerate does to what there is so far."""
    if every and precision == "fp16":
        with pytest.raises(RuntimeError, match="already been called"):
            accumulate(False, precision, clip, every)
        with pytest.raises(RuntimeError, match="already been called"):
            accumulate(True, precision, clip, every)
        return
    stock, ours = accumulate(False, precision, clip, every), accumulate(True, precision, clip, every)
    assert_same(ours, stock)
    assert_norms(ours.norms, stock.norms)
    assert ours.rates == stock.rates
    assert len(ours.passes) < len(stock.passes) if every else ours.passes == [] != stock.passes


def accumulate(fused: bool, precision: str, clip: str, every: bool) -> Run:
    run = Run(fused, precision, gradient_accumulation_steps=3)
    for step in range(20):
        with run.accelerator.accumulate(run.model):
            run.backward(step)
            with GradientPasses(run.params()) as passes:
                if run.accelerator.sync_gradients or every:
                    run.norms.append(CLIPS[clip](run))
                run.optimizer.step()
            run.passes += passes.seen
            run.scheduler.step()
            run.rates.append(run.scheduler.get_last_lr()[0])
            run.optimizer.zero_grad()
    return run


class TestTheNorm:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("unscaled", [False, True])
    def test_may_be_read_before_the_step(self, precision: str, unscaled: bool) -> None:
        def clip(run: Run) -> float:
            if unscaled and isinstance(run.inner, fusedopt.FusedOptimizer):  # stock would unscale twice
                run.accelerator.unscale_gradients()
            return run.accelerator.clip_grad_norm_(run.model.parameters(), 0.3).item()

        stock, ours = Run(False, precision).train(range(20), clip), Run(True, precision).train(range(20), clip)
        assert_same(ours, stock)
        assert ours.norms == pytest.approx(stock.norms, rel=1e-5, nan_ok=True)
        assert ours.skipped == stock.skipped

    def test_is_still_there_many_steps_later(self) -> None:
        ours = Run(True)
        ours.train(range(4), CLIPS["norm"])
        assert len({norm.item() for norm in ours.norms}) == 4

    def test_without_a_step(self) -> None:
        ours, stock = Run(True), Run(False)
        for run in (ours, stock):
            run.backward(0)
            run.norms.append(CLIPS["norm"](run))
            run.optimizer.zero_grad()
            run.train(range(1, 4))
        assert_norms(ours.norms[:1], stock.norms[:1])
        assert_same(ours, stock)

    def test_can_be_gathered_and_reduced(self) -> None:
        run = Run(True)
        run.backward(0)
        norm = CLIPS["norm"](run)
        run.optimizer.step()
        want = run.inner.last_step.grad_norm
        assert run.accelerator.gather(norm) == want == run.accelerator.reduce(norm, "mean")


class TestClippingSomethingElse:
    """Goes accelerate's way, and is as right as there."""

    def both(self, clip: Callable[[Run], Any], precision: str = "no", **settings: Any) -> tuple[Run, Run]:
        stock = Run(False, precision, **settings).train(range(20), clip)
        ours = Run(True, precision, **settings).train(range(20), clip)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        assert ours.skipped == stock.skipped
        return ours, stock

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("kind", ["norm", "value"])
    def test_a_part_of_the_parameters(self, precision: str, kind: str) -> None:
        def clip(run: Run) -> Any:
            if kind == "norm":
                return run.accelerator.clip_grad_norm_(run.model[0].parameters(), 0.2)
            return run.accelerator.clip_grad_value_(run.model[0].parameters(), 0.02)

        self.both(clip, precision)

    @pytest.mark.parametrize("first", ["norm", "value"])
    @pytest.mark.parametrize("second", ["norm", "value", "part"])
    def test_twice(self, first: str, second: str) -> None:
        def clip(run: Run) -> Any:
            norm = CLIPS[first](run)
            if second == "part":
                run.accelerator.clip_grad_norm_(run.model[0].parameters(), 0.05)
            else:
                CLIPS[second](run)
            return norm

        self.both(clip)

    def test_twice_with_a_scaler_which_accelerate_cannot(self) -> None:
        def twice(run: Run) -> Any:
            CLIPS["value"](run)
            return CLIPS["norm"](run)

        def plainly(run: Run) -> Any:
            run.accelerator.unscale_gradients()
            nn.utils.clip_grad_value_(run.model.parameters(), 0.05)
            return nn.utils.clip_grad_norm_(run.model.parameters(), 0.3)

        stock = Run(False, "fp16").train(range(20), plainly)
        ours = Run(True, "fp16").train(range(20), twice)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)

    def test_a_part_after_the_whole_with_a_scaler(self) -> None:
        def ours(run: Run) -> Any:
            norm = CLIPS["norm"](run)
            run.accelerator.clip_grad_norm_(run.model[0].parameters(), 0.05)
            return norm

        def plainly(run: Run) -> Any:
            norm = CLIPS["norm"](run)
            nn.utils.clip_grad_norm_(run.model[0].parameters(), 0.05)
            return norm

        stock = Run(False, "fp16").train(range(20), plainly)
        run = Run(True, "fp16").train(range(20), ours)
        assert_same(run, stock)
        assert_norms(run.norms, stock.norms)

    @pytest.mark.parametrize("bound", [0.0, -1.0])
    def test_bounds_that_a_step_does_not_take(self, bound: float) -> None:
        self.both(norm_clip(bound))

    def test_a_parameter_twice(self) -> None:
        def clip(run: Run) -> Any:
            return run.accelerator.clip_grad_norm_([*run.model.parameters(), run.model[0].weight], 0.2)

        self.both(clip)

    def test_a_tensor(self) -> None:
        """accelerate itself would iterate over its rows, which have no gradients."""
        ours, stock = Run(True), Run(False)
        for run in (ours, stock):
            run.backward(0)
        norm = ours.accelerator.clip_grad_norm_(ours.model[0].weight, 0.2)
        assert_norms([norm], [nn.utils.clip_grad_norm_(stock.model[0].weight, 0.2)])

    def test_nothing_that_has_gradients(self) -> None:
        run = Run(True)
        assert run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0) == 0
        assert run.accelerator.clip_grad_norm_([], 1.0) == 0
        assert run.inner._shared.next is None
        run.step(0)

    def test_a_tensor_as_the_bound(self) -> None:
        self.both(lambda run: run.accelerator.clip_grad_norm_(run.params(), torch.tensor(0.3)))


def test_parameters_without_gradients_do_not_count() -> None:
    def run(fused: bool) -> Run:
        run = Run(fused)
        run.model[0].weight.requires_grad_(False)
        run.model.register_parameter("unused", nn.Parameter(torch.ones(3)))  # not in the optimizer
        return run.train(range(5), CLIPS["norm"])

    ours, stock = run(True), run(False)
    assert_same(ours, stock)
    assert ours.passes == [] != stock.passes
    ours.model.unused.grad = torch.ones(3)  # from here on it does
    stock.model.unused.grad = torch.ones(3)
    for each in (ours, stock):
        each.train(range(5, 8), CLIPS["norm"])
    assert_same(ours, stock)
    assert ours.passes != []


class Two:
    """A model with an optimizer for each half."""

    def __init__(self, kinds: list[Any], precision: str = "no"):
        self.accelerator = accelerator_of(precision)
        if precision == "fp16":  # accelerate would let it grow between the steps of the two
            self.accelerator.scaler.set_growth_interval(1000)
        if fused_adamw in kinds:
            fuse(self.accelerator)
        model = model_of()
        halves = (model[0], model[2])
        optimizers = [kind(half.parameters()) for kind, half in zip(kinds, halves, strict=True)]
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.norms: list[Any] = []
        self.passes: list[str] = []

    def train(self, clip: Callable[[Two], list[Any]], order: tuple[int, int] = (0, 1)) -> Two:
        for step in range(10):
            loss = self.model(batch_of(step)).float().square().mean()
            self.accelerator.backward(loss)
            with GradientPasses(self.model.parameters()) as passes:
                self.norms += clip(self)
                for i in order:
                    self.optimizers[i].step()
            self.passes += passes.seen
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return self

    def train_plainly(self, *parts: slice) -> Two:
        """As torch's documentation has it: accelerate itself updates the scale, and so unscales again, in between."""
        scaler = self.accelerator.scaler
        inner = [optimizer.optimizer for optimizer in self.optimizers]
        for step in range(10):
            loss = self.model(batch_of(step)).float().square().mean()
            self.accelerator.backward(loss)
            for optimizer in inner if scaler else ():
                scaler.unscale_(optimizer)
            params = list(self.model.parameters())
            self.norms += [nn.utils.clip_grad_norm_(params[part], 0.2) for part in parts]
            for optimizer in inner:
                scaler.step(optimizer) if scaler else optimizer.step()
                optimizer.zero_grad()
            if scaler:
                scaler.update()
        return self


def clip_halves(run: Two) -> list[Any]:
    return [run.accelerator.clip_grad_norm_(run.model[i].parameters(), 0.2) for i in (0, 2)]


def clip_whole(run: Two) -> list[Any]:
    return [run.accelerator.clip_grad_norm_(run.model.parameters(), 0.2)]


HALVES = slice(0, 2), slice(2, 4)
BOTH_STOCK = [stock_adamw, stock_adamw]


class TestTwoOptimizers:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_each_by_its_own_norm(self, precision: str) -> None:
        stock = Two(BOTH_STOCK, precision).train_plainly(*HALVES)
        ours = Two([fused_adamw, fused_adamw], precision).train(clip_halves)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        assert ours.passes == []

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_both_by_one_norm(self, order: tuple[int, int], precision: str) -> None:
        stock = Two(BOTH_STOCK, precision).train_plainly(slice(4))
        ours = Two([fused_adamw, fused_adamw], precision).train(clip_whole, order)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)

    @pytest.mark.parametrize("kinds", [[fused_adamw, stock_adamw], [stock_adamw, fused_adamw]], ids=["first", "last"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_stock_one_beside_a_fused_one(self, kinds: list[Any], precision: str) -> None:
        stock = Two(BOTH_STOCK, precision).train_plainly(*HALVES)
        at = kinds.index(stock_adamw)
        ours = Two(kinds, precision).train(clip_halves, (at, 1 - at))
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        assert type(ours.optimizers[at]) is AcceleratedOptimizer
        with GradientPasses(ours.model[0 if at else 2].parameters()) as passes:
            ours.train(clip_halves, (at, 1 - at))
        assert passes.seen == []

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_stock_one_and_a_fused_one_by_one_norm(self, precision: str) -> None:
        """The stock one first: its step updates the scale."""
        stock = Two(BOTH_STOCK, precision).train_plainly(slice(4))
        ours = Two([stock_adamw, fused_adamw], precision).train(clip_whole)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)

    def test_one_that_does_not_step_after_all(self) -> None:
        """It is not taken for unscaled in the next iteration."""

        def run(kinds: list[Any]) -> Two:
            run = Two(kinds, "fp16")
            for step in range(4):
                run.accelerator.backward(run.model(batch_of(step)).square().mean())
                if step % 2 == 0:
                    clip_whole(run)
                run.optimizers[0].step()
                if step % 2:
                    run.optimizers[1].step()
                for optimizer in run.optimizers:
                    optimizer.zero_grad()
            return run

        assert_same(run([fused_adamw, fused_adamw]), run(BOTH_STOCK))

    @pytest.mark.parametrize("had_gradients", [False, True])
    @pytest.mark.parametrize("clip", [True, False])
    def test_gradients_that_come_after_the_unscaling(self, had_gradients: bool, clip: bool) -> None:
        """They are not taken for unscaled: not where there were none, nor where the model has thrown others away."""

        def run(kinds: list[Any]) -> Two:
            run = Two(kinds, "fp16")
            first, last = run.model[0], run.model[2]
            for step in range(4):
                inputs = first(batch_of(step))
                run.accelerator.backward(last(inputs if had_gradients else inputs.detach()).square().mean())
                clip_whole(run) if clip else run.accelerator.unscale_gradients()
                run.optimizers[1].step()
                run.model.zero_grad()
                run.accelerator.backward(last(first(batch_of(step))).square().mean())
                run.optimizers[0].step()
                run.model.zero_grad()
            return run

        assert_same(run([fused_adamw, fused_adamw]), run(BOTH_STOCK))

    @pytest.mark.parametrize("other", [fused_adamw, stock_adamw])
    @pytest.mark.parametrize("last", [False, True])
    def test_over_the_same_parameters(self, other: Any, last: bool) -> None:
        """As after a second prepare(): either could step."""
        accelerator = fuse(accelerator_of())
        model = model_of()
        kinds = [fused_adamw, other] if last else [other, fused_adamw]
        accelerator.prepare(model, *[kind(model.parameters()) for kind in kinds])
        model(batch_of(0)).square().mean().backward()
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        assert type(norm) is torch.Tensor
        norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
        assert norm == pytest.approx(0.1, rel=1e-4)

    def test_the_same_one_prepared_twice(self) -> None:
        run = Run(True)
        run.accelerator.prepare(run.inner)
        run.train(range(3), CLIPS["norm"])
        assert run.passes == []

    def test_one_that_was_not_prepared(self) -> None:
        accelerator = fuse(accelerator_of())
        model = accelerator.prepare(model_of())
        optimizer = fused_adamw(model.parameters())
        model(batch_of(0)).square().mean().backward()
        assert type(accelerator.clip_grad_norm_(model.parameters(), 0.1)) is torch.Tensor
        assert optimizer._shared.next is None


def test_parameters_that_are_replaced_and_added() -> None:
    """What was known of them is not taken for granted."""
    ours, stock = Run(True), Run(False)
    for run in (ours, stock):
        run.train(range(3), CLIPS["norm"])
        torch.manual_seed(1)
        run.model.append(nn.Linear(3, 3))
        run.train(range(3, 6), CLIPS["norm"])  # the new layer is clipped with the others, and not stepped
        run.model.zero_grad()
        run.optimizer.add_param_group({"params": list(run.model[3].parameters())})
        run.scheduler = functools.partial(int)
        run.scheduler.step = int
    assert ours.passes != []
    ours.passes.clear()
    for run in (ours, stock):
        run.train(range(8, 12), CLIPS["norm"])
    assert_same(ours, stock)
    assert_norms(ours.norms, stock.norms)
    assert ours.passes == []


class TestOwnClipping:
    def test_is_refused_beside_the_accelerators(self) -> None:
        run = Run(True)
        run.optimizer.clip_grad = dict(max_norm=0.3)
        run.backward(0)
        for clip in ("norm", "value"):
            with pytest.raises(ValueError, match="the trainer clips, and FusedAdamW has clip_grad="):
                CLIPS[clip](run)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_goes_with_one_that_only_reports(self, precision: str) -> None:
        stock = Run(False, precision).train(range(20), CLIPS["norm"])
        ours = Run(True, precision)
        ours.optimizer.clip_grad = dict(max_norm=0.3)
        ours.train(range(20), CLIPS["report"])
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)

    def test_alone_makes_no_pass(self) -> None:
        stock = Run(False, "fp16").train(range(20), CLIPS["norm"])
        ours = Run(True, "fp16")
        ours.optimizer.clip_grad = dict(max_norm=0.3)
        ours.train(range(20))
        assert_same(ours, stock)
        assert ours.passes == []


class TestWhoLooksAtTheGradients:
    def test_a_hook_sees_them_as_they_are_before_clipping(self) -> None:
        seen = []
        run = Run(True, "fp16")
        run.inner.register_step_pre_hook(lambda *_: seen.append(run.model[0].weight.grad.clone()))
        run.backward(0)
        before = run.model[0].weight.grad.clone()
        CLIPS["norm"](run)
        run.optimizer.step()
        assert torch.equal(seen[0], before)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_unscale_gradients_makes_them_what_they_are_with_stock(self, precision: str) -> None:
        def clip(run: Run) -> Any:
            norm = CLIPS["norm"](run)
            if isinstance(run.inner, fusedopt.FusedOptimizer):
                run.accelerator.unscale_gradients(run.optimizer)
            grads.append(run.model[0].weight.grad.clone())
            return norm

        grads: list[torch.Tensor] = []
        stock, ours = Run(False, precision).train(range(20), clip), Run(True, precision).train(range(20), clip)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        torch.testing.assert_close(grads[20:], grads[:20], equal_nan=True)

    def test_who_writes_to_them_is_told(self) -> None:
        run = Run(True)
        run.backward(0)
        CLIPS["norm"](run)
        run.backward(1)  # without accumulate()
        with pytest.raises(RuntimeError, match="somebody has written to"):
            run.optimizer.step()


class TestCheckpoints:
    @pytest.mark.parametrize("precision", ["no", "fp16"])
    @pytest.mark.parametrize("fused", [(True, False), (False, True), (True, True)])
    def test_go_on_with_the_other(self, tmp_path: Any, precision: str, fused: tuple[bool, bool]) -> None:
        expected = Run(False, precision).train(range(20), CLIPS["norm"])
        first = Run(fused[0], precision).train(range(10), CLIPS["norm"])
        first.accelerator.save_state(str(tmp_path))
        second = Run(fused[1], precision)
        second.accelerator.load_state(str(tmp_path))
        second.train(range(10, 20), CLIPS["norm"])
        assert_same(second, expected)
        assert second.rates == expected.rates[10:]
        if precision == "fp16":
            assert second.accelerator.scaler.state_dict() == expected.accelerator.scaler.state_dict()

    def test_right_after_a_skipped_first_step(self, tmp_path: Any) -> None:
        first = Run(True, "fp16").train(range(OVERFLOW, OVERFLOW + 1), CLIPS["norm"])
        first.accelerator.save_state(str(tmp_path))
        second = Run(False, "fp16")
        second.accelerator.load_state(str(tmp_path))
        second.train(range(OVERFLOW + 1, 20))
        assert_same(second, Run(False, "fp16").train(range(OVERFLOW, 20)))


class TestUndoing:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_gives_everything_back(self, precision: str) -> None:
        run = Run(True, precision).train(range(3), CLIPS["norm"])
        assert not isinstance(run.accelerator.scaler, GradScaler) or precision == "fp16"
        assert unfuse(run.accelerator) is run.accelerator
        assert not {"clip_grad_norm_", "clip_grad_value_", "unscale_gradients", "prepare_optimizer", "_fusedopt"} & {
            *vars(run.accelerator)
        }
        assert type(run.optimizer) is AcceleratedOptimizer
        assert precision != "fp16" or type(run.accelerator.scaler) is torch.amp.GradScaler
        run.train(range(3, 6), CLIPS["norm"])
        assert run.passes != []
        fuse(run.accelerator)
        run.passes.clear()
        run.train(range(6, 20), CLIPS["norm"])
        assert run.passes == []
        stock = Run(False, precision).train(range(20), CLIPS["norm"])
        assert_same(run, stock)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_clips_what_was_to_be_clipped(self, precision: str) -> None:
        stock, ours = Run(False, precision), Run(True, precision)
        for run in (stock, ours):
            run.backward(0)
            run.norms.append(CLIPS["norm"](run))
            unfuse(run.accelerator)
            assert run is stock or run.inner._shared.next is None
            run.optimizer.step()
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)

    def test_once_is_enough_and_twice_is_the_same(self) -> None:
        run = Run(True, "fp16", after=True)
        before = dict(vars(run.accelerator))
        fuse(fuse(run.accelerator))
        assert dict(vars(run.accelerator)) == before
        unfuse(run.accelerator)
        assert "clip_grad_norm_" not in vars(run.accelerator)
        unfuse(run.accelerator)

    def test_leaves_a_method_of_the_users_own(self) -> None:
        accelerator = accelerator_of()
        stock = accelerator.clip_grad_norm_
        mine = accelerator.clip_grad_norm_ = lambda *args: stock(*args)
        fuse(accelerator)
        assert accelerator.clip_grad_norm_ is not mine
        ours = accelerator.clip_grad_norm_
        unfuse(accelerator)
        assert accelerator.clip_grad_norm_ is mine
        fuse(accelerator)
        ours = accelerator.clip_grad_norm_
        other = accelerator.clip_grad_norm_ = lambda *args: ours(*args)
        unfuse(accelerator)
        assert accelerator.clip_grad_norm_ is other
        model = accelerator.prepare(model_of())
        accelerator.prepare(fused_adamw(model.parameters()))
        model(batch_of(0)).square().mean().backward()
        assert type(other(model.parameters(), 0.1)) is torch.Tensor  # the stock way again

    def test_an_accelerator_that_goes_is_gone(self) -> None:
        run = Run(True).train(range(2), CLIPS["norm"])
        assert run.accelerator.free_memory(run.model, run.optimizer) == [None, None]
        run.accelerator.clip_grad_norm_([], 1.0)


def test_another_optimizer_put_into_the_wrapper_says_itself_whether_it_was_skipped() -> None:
    run = Run(True, "fp16")
    run.optimizer.__setstate__({"optimizer": fusedopt.unfuse(run.inner)})
    run.train(range(OVERFLOW + 2), CLIPS["norm"])
    assert run.skipped == [step == OVERFLOW for step in range(OVERFLOW + 2)]


class TestScalers:
    def test_one_of_the_users_own_unscales_as_it_does(self) -> None:
        class Mine(torch.amp.GradScaler):
            pass

        def run(fused: bool) -> Run:
            run = Run.__new__(Run)
            run.accelerator = accelerator_of("fp16")
            run.accelerator.scaler = Mine("cpu", init_scale=2.0**8, growth_interval=5)
            fuse(run.accelerator)
            model = model_of()
            run.inner = (fused_adamw if fused else stock_adamw)(model.parameters())
            scheduler = torch.optim.lr_scheduler.LinearLR(run.inner, 1.0, 0.1, 20)
            run.model, run.optimizer, run.scheduler = run.accelerator.prepare(model, run.inner, scheduler)
            run.norms, run.rates, run.skipped, run.passes = [], [], [], []
            run.train(range(20), CLIPS["norm"])
            assert type(run.accelerator.scaler) is Mine
            return run

        ours, stock = run(True), run(False)
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        assert ours.skipped == stock.skipped and sum(ours.skipped) == 1
        assert ours.rates == stock.rates
        assert len(ours.passes) < len(stock.passes)

    @pytest.mark.parametrize("own", [False, True])
    def test_one_that_is_to_unscale_by_itself(self, own: bool) -> None:
        class Mine(torch.amp.GradScaler):
            pass

        ours = Run(True, "fp16")
        if own:
            ours.accelerator.scaler.__class__ = Mine
        ours.inner._step_supports_amp_scaling = False
        ours.train(range(20), CLIPS["norm"])
        stock = Run(False, "fp16").train(range(20), CLIPS["norm"])
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)
        assert ours.skipped == stock.skipped

    def test_one_that_is_off(self) -> None:
        runs = []
        for fused in (False, True):
            run = Run(fused, "fp16")
            run.accelerator.scaler._enabled = False
            runs.append(run)
            for step in range(3):
                run.step(step, CLIPS["norm"])
        assert_same(*runs)
        assert runs[1].passes == []

    def test_one_that_came_after_the_optimizer(self) -> None:
        """accelerate unscales by it, and steps without it."""
        ours, stock = Run(True), Run(False)
        for run in (ours, stock):
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
            run.accelerator.native_amp = True
            run.accelerator.state._mixed_precision = "fp16"
            run.backward(0)
            run.norms.append(CLIPS["norm"](run))
            run.optimizer.step()
        assert_same(ours, stock)
        assert_norms(ours.norms, stock.norms)


def test_prepared_optimizers_can_be_copied_and_pickled() -> None:
    run = Run(True, "fp16").train(range(2), CLIPS["norm"])
    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert type(copied) is FusedAcceleratedOptimizer
        assert not copied.step_was_skipped
    assert math.isfinite(run.norms[0])


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP", "XLA", "MULTI_XPU"])
def test_where_gradients_lie_elsewhere_it_is_not_asked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(True)
    run.backward(0)
    asked: list[Any] = []
    monkeypatch.setitem(run.accelerator._fusedopt._stock, "clip_grad_norm_", lambda *args: asked.append(args))
    monkeypatch.setitem(run.accelerator._fusedopt._stock, "clip_grad_value_", lambda *args: asked.append(args))
    monkeypatch.setattr(run.accelerator.state, "fsdp_plugin", type("Plugin", (), {"fsdp_version": 1}), raising=False)
    run.accelerator.state.distributed_type = accelerate.DistributedType(kind)
    CLIPS["norm"](run)
    CLIPS["value"](run)
    assert len(asked) == 2
    assert run.inner._shared.next is None


@pytest.mark.parametrize("what", [None, nn.Linear(1, 1), "accelerator"])
def test_something_else_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=f"takes an accelerate.Accelerator; got {type(what).__name__}"):
        fuse(what)


def test_without_accelerate_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"accelerate is not installed.*pip install 'fusedopt\[accelerate\]'"):
        import_again("accelerate")


def test_accelerates_users_need_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert import_again("accelerate").fuse(accelerator_of())


def import_again(name: str) -> Any:
    path = Path(fusedopt.__file__).parent / "integrations" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fusedopt.integrations.{name}_again", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    AcceleratorState._reset_state(reset_partial_state=True)
    path = Path(__file__).resolve().parents[2] / "examples" / "accelerate_digits.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--epochs", "2"])
    runpy.run_path(str(path), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    assert float(re.match(r"accuracy ([\d.]+)%", line)[1]) > 75
