"""fuse(fabric): clip_gradients in the step, with the numbers of the stock optimizer and without its passes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning.fabric", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

from lightning.fabric import Fabric, strategies
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning_cases import OVERFLOW, PRECISIONS, SCALE, STEPS, Layers, batches, fused, stock
from probe import GradientPasses

import fusedopt
from fusedopt.integrations.lightning import fuse, unfuse
from fusedopt.integrations.lightning_parts.clipping import serves_strategy

CLIPS: list[dict[str, Any]] = [dict(max_norm=0.5), dict(max_norm=0.1, norm_type=1.0), dict(clip_val=0.01)]
CLIP_IDS = ["norm", "norm 1", "value"]


def make_fabric(precision: Any = "32-true", scale: float = SCALE, **settings: Any) -> Fabric:
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        settings["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    elif isinstance(precision, MixedPrecision):
        settings["plugins"] = precision
    else:
        settings["precision"] = precision
    return Fabric(**{"accelerator": "cpu", "devices": 1, **settings})


class Run:
    """A training run with Fabric; ``clip`` is called between a backward pass and the step."""

    def __init__(
        self,
        make: Callable[..., Any],
        precision: Any = "32-true",
        *,
        overflow_at: int | None = None,
        fuse_after: bool = False,
        own: Fabric | None = None,
    ):
        self.fabric = make_fabric(precision) if own is None else own
        torch.manual_seed(0)
        self.layers = Layers()
        self.inner = make(self.layers.parameters())
        if make is not stock and not fuse_after:
            fuse(self.fabric)
        self.model, self.optimizer = self.fabric.setup(self.layers, self.inner)
        if make is not stock and fuse_after:
            fuse(self.fabric)
        self.overflow_at = overflow_at

    @property
    def scale(self) -> float | None:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return None if scaler is None else scaler.get_scale()

    def backward(self, batch: Any, index: int) -> None:
        self.fabric.backward(self.layers(batch))
        if index == self.overflow_at:
            self.layers[0].weight.grad += torch.eye(8, 6) * math.inf

    def clip(self, **clip: Any) -> Tensor | None:
        return self.fabric.clip_gradients(self.model, self.optimizer, **clip)

    def train(self, clip: Callable[[], Any] = lambda: None, steps: int = STEPS) -> list[Any]:
        found = []
        for index, batch in enumerate(batches(steps)):
            self.optimizer.zero_grad()
            self.backward(batch, index)
            found.append(clip())
            self.optimizer.step()
        return found

    def assert_same(self, want: Run) -> None:
        for param, expected in zip(self.layers.parameters(), want.layers.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fuse_after", [False, True])
@pytest.mark.parametrize("clip", CLIPS, ids=CLIP_IDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_numbers_and_norms_without_a_pass(precision: str, clip: dict[str, Any], fuse_after: bool) -> None:
    overflow_at = OVERFLOW if precision == "16-mixed" else None
    run = Run(fused, precision, overflow_at=overflow_at, fuse_after=fuse_after)
    want = Run(stock, precision, overflow_at=overflow_at)
    with GradientPasses(run.layers.parameters()) as passes:
        norms = run.train(lambda: run.clip(**clip))
    lenient = {} if "clip_val" in clip else {"error_if_nonfinite": False}
    expected = want.train(lambda: want.clip(**clip, **lenient))
    run.assert_same(want)
    assert passes.seen == []
    assert run.scale == want.scale == (SCALE / 2 if precision == "16-mixed" else None)
    for norm, other in zip(norms, expected, strict=True):
        if "clip_val" in clip:
            assert norm is other is None
        else:
            torch.testing.assert_close(norm.clone(), other, equal_nan=True, rtol=1e-6, atol=0)


def test_the_probe_sees_what_the_stock_way_does() -> None:
    run = Run(stock, "16-mixed")
    with GradientPasses(run.layers.parameters()) as passes:
        run.train(lambda: run.clip(max_norm=0.5))
    assert "aten._foreach_mul_.Tensor" in passes.seen and any("unscale" in name for name in passes.seen)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_clipping(precision: str) -> None:
    run, want = Run(fused, precision), Run(stock, precision)
    with GradientPasses(run.layers.parameters()) as passes:
        run.train()
    want.train()
    run.assert_same(want)
    assert passes.seen == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_norm_may_be_read_before_the_step(precision: str) -> None:
    run, want = Run(fused, precision), Run(stock, precision)
    norms = run.train(lambda: run.clip(max_norm=0.5).item())
    assert norms == pytest.approx(want.train(lambda: want.clip(max_norm=0.5).item()), rel=1e-6)
    run.assert_same(want)


class TestNonFinite:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_without_a_scaler_it_is_an_error_by_default_in_the_step(self, precision: str) -> None:
        run = Run(fused, precision, overflow_at=3)
        before: list[Any] = []

        def clip() -> None:
            before[:] = [param.clone() for param in run.layers.parameters()]
            run.clip(max_norm=0.5)

        with pytest.raises(RuntimeError, match="norm of the gradients is nan"):
            run.train(clip)
        assert all(map(torch.equal, before, run.layers.parameters()))

    def test_unless_it_is_allowed(self) -> None:
        run, want = Run(fused, overflow_at=3), Run(stock, overflow_at=3)
        for each in (run, want):
            each.train(lambda each=each: each.clip(max_norm=0.5, error_if_nonfinite=False), steps=5)
        assert all(param.isnan().all() for param in run.layers.parameters())
        assert all(param.isnan().all() for param in want.layers.parameters())

    @pytest.mark.parametrize("reads", [False, True])
    def test_that_a_scaler_skips_is_none(self, reads: bool) -> None:
        run = Run(fused, "16-mixed", overflow_at=3)

        def clip() -> Any:
            norm = run.clip(max_norm=0.5, error_if_nonfinite=True)
            assert not reads or not norm.item() > 100.0
            return norm

        norms = run.train(clip)
        assert not norms[3].isfinite() and run.scale == SCALE / 2


class TestHostileUses:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("first", [dict(clip_val=0.02), dict(max_norm=0.3)])
    def test_clipping_twice(self, precision: str, first: dict[str, Any]) -> None:
        run = Run(fused, precision)
        want = Run(stock, precision)

        def expect() -> None:
            want.clip(**first)
            torch.nn.utils.clip_grad_norm_(want.layers.parameters(), 0.05)  # stock Fabric unscales once only

        run.train(lambda: (run.clip(**first), run.clip(max_norm=0.05)))
        want.train(expect)
        run.assert_same(want)

    def test_the_optimizer_decides_which_parameters_are_clipped_as_in_stock_fabric(self) -> None:
        run, want = Run(fused), Run(stock)
        for each in (run, want):
            each.train(lambda each=each: each.fabric.clip_gradients(each.layers[2], each.optimizer, max_norm=0.5))
        run.assert_same(want)

    @pytest.mark.parametrize("reads", [False, True])
    @pytest.mark.parametrize("inner", [False, True])
    def test_gradients_that_were_unscaled_by_hand(self, inner: bool, reads: bool) -> None:
        run, want = Run(fused, "16-mixed", overflow_at=OVERFLOW), Run(stock, "16-mixed", overflow_at=OVERFLOW)

        def clip() -> None:
            run.fabric.strategy.precision.scaler.unscale_(run.inner if inner else run.optimizer)
            norm = run.clip(max_norm=0.5)
            if reads:
                assert not norm.item() > 100.0  # as the scaled one

        run.train(clip)
        want.train(lambda: want.clip(max_norm=0.5, error_if_nonfinite=False))
        run.assert_same(want)
        assert run.scale == SCALE / 2

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_step_that_is_skipped_by_the_user(self, precision: str) -> None:
        runs = Run(fused, precision), Run(stock, precision)
        for each in runs:
            for index, batch in enumerate(batches()):
                each.optimizer.zero_grad()
                each.backward(batch, index)
                if index % 3 != 2:
                    each.clip(max_norm=0.5)
                    each.optimizer.step()
                elif each.inner is runs[0].inner:  # stock Fabric could not unscale again in 16-mixed
                    each.clip(max_norm=1e-3)
        runs[0].assert_same(runs[1])

    def test_accumulation(self) -> None:
        runs = Run(fused, "16-mixed"), Run(stock, "16-mixed")
        for each in runs:
            for index, batch in enumerate(batches(2 * STEPS)):
                each.backward(batch, index)
                if index % 2:
                    each.clip(max_norm=0.5)
                    each.optimizer.step()
                    each.optimizer.zero_grad()
        runs[0].assert_same(runs[1])

    def test_to_clip_in_every_micro_batch_is_refused(self) -> None:
        run = Run(fused)
        data = batches()
        run.backward(data[0], 0)
        run.clip(max_norm=0.5)
        run.backward(data[1], 1)
        with pytest.raises(RuntimeError, match="written to since it was told to"):
            run.clip(max_norm=0.5)

    def test_clip_grad_of_its_own(self) -> None:
        def make(params: Any) -> Any:
            return fusedopt.FusedAdamW(params, lr=1e-2, clip_grad=dict(max_norm=0.5))

        run, want = Run(make, "16-mixed"), Run(stock, "16-mixed")
        run.train()
        want.train(lambda: want.clip(max_norm=0.5))
        run.assert_same(want)
        with pytest.raises(ValueError, match="clips, and FusedAdamW has clip_grad="):
            run.train(lambda: run.clip(max_norm=0.5))

    @pytest.mark.parametrize("clip", [dict(max_norm=0.0), dict(clip_val=-1.0), dict(max_norm=1.0, norm_type=-1)])
    def test_bad_settings(self, clip: dict[str, Any]) -> None:
        run = Run(fused)
        with pytest.raises(ValueError, match="Invalid clip_grad"):
            run.train(lambda: run.clip(**clip))


class TestStockWays:
    def test_a_stock_optimizer_beside(self) -> None:
        runs = []
        for fuses in (True, False):
            run = Run(stock, "16-mixed", overflow_at=OVERFLOW)
            if fuses:
                fuse(run.fabric)
            with GradientPasses(run.layers.parameters()) as passes:
                run.train(lambda run=run: run.clip(max_norm=0.5, error_if_nonfinite=False))
            runs.append((run, passes.seen))
        assert runs[0][1] == runs[1][1]
        assert all(map(torch.equal, runs[0][0].layers.parameters(), runs[1][0].layers.parameters()))
        assert runs[0][0].scale == runs[1][0].scale == SCALE / 2

    @pytest.mark.parametrize("clip", CLIPS, ids=CLIP_IDS)
    def test_a_scaler_of_another_class(self, clip: dict[str, Any]) -> None:
        class Scaler(torch.amp.GradScaler):
            unscaled = 0

            def unscale_(self, optimizer: Any) -> None:
                self.unscaled += 1
                super().unscale_(optimizer)

        runs = []
        for make in (fused, stock):
            plugin = MixedPrecision("16-mixed", "cpu", Scaler("cpu", init_scale=SCALE))
            run = Run(make, plugin, overflow_at=OVERFLOW)
            lenient = {} if "clip_val" in clip else {"error_if_nonfinite": False}
            run.train(lambda run=run, lenient=lenient: run.clip(**clip, **lenient))
            runs.append(run)
            assert type(plugin.scaler) is Scaler and run.scale == SCALE / 2 and plugin.scaler.unscaled == STEPS
        runs[0].assert_same(runs[1])

    @pytest.mark.parametrize("where", ["plugin", "strategy"])
    def test_methods_of_somebody_elses_own(self, where: str) -> None:
        class Plugin(Precision):
            def main_params(self, optimizer: Any) -> Any:
                yield optimizer.param_groups[0]["params"][0]

        class Strategy(strategies.SingleDeviceStrategy):
            def clip_gradients_norm(self, module: Any, optimizer: Any, max_norm: float, **rest: Any) -> Any:
                return torch.nn.utils.clip_grad_norm_(module[2].parameters(), max_norm)

        runs = []
        for make in (fused, stock):
            own = make_fabric()
            if where == "plugin":
                own.strategy.precision = Plugin()
            else:
                own.strategy.__class__ = Strategy
            run = Run(make, own=own)
            run.train(lambda run=run: run.fabric.clip_gradients(run.layers, run.optimizer, max_norm=0.1))
            runs.append(run)
        runs[0].assert_same(runs[1])

        def make_clipping(params: Any) -> Any:
            return fusedopt.FusedAdamW(params, lr=1e-2, clip_grad=dict(max_norm=0.5))

        run = Run(make_clipping, own=runs[0].fabric)
        with pytest.raises(ValueError, match="clips, and FusedAdamW has clip_grad="):
            run.train(lambda: run.clip(max_norm=0.5))


class TestUndoing:
    def test_twice_is_once_and_unfuse_restores_all(self) -> None:
        own = make_fabric("16-mixed")
        scaler, before = own.strategy.precision.scaler, dict(vars(own.strategy))
        unfuse(own)
        fuse(own)
        changed = dict(vars(own.strategy))
        assert set(changed) - set(before) == {"clip_gradients_norm", "clip_gradients_value", "_fusedopt_replaced"}
        assert type(scaler) is fusedopt.amp.GradScaler
        fuse(own)
        assert vars(own.strategy) == changed
        unfuse(own)
        unfuse(own)
        assert vars(own.strategy) == before and type(scaler) is torch.amp.GradScaler

    def test_a_run_goes_on_in_the_stock_way(self) -> None:
        run, want = Run(fused), Run(stock)
        run.train(lambda: run.clip(max_norm=0.5), steps=5)
        unfuse(run.fabric)
        with GradientPasses(run.layers.parameters()) as passes:
            run.train(lambda: run.clip(max_norm=0.5), steps=5)
        for _ in range(2):
            want.train(lambda: want.clip(max_norm=0.5), steps=5)
        run.assert_same(want)
        assert "aten._foreach_norm.Scalar" in passes.seen

    def test_nothing_keeps_a_fabric_alive(self) -> None:
        own = make_fabric()
        fuse(own)
        strategy = weakref.ref(own.strategy)
        del own
        gc.collect()
        assert strategy() is None


class TestRefused:
    def test_which_strategies_are_served(self) -> None:
        class Mine(strategies.DDPStrategy):
            pass

        every = [
            each
            for each in vars(strategies).values()
            if isinstance(each, type) and issubclass(each, strategies.Strategy)
        ]
        served = {each.__name__ for each in [*every, Mine] if serves_strategy(("lightning",), each)}
        known = {"SingleDeviceStrategy", "DDPStrategy", "DataParallelStrategy", "ModelParallelStrategy"}
        assert served == {*known, "Mine"}
        assert len(every) > 8

    def test_others_by_name(self) -> None:
        own = make_fabric()
        own._strategy = strategies.FSDPStrategy()
        with pytest.raises(ValueError, match="does not serve FSDPStrategy; expected SingleDeviceStrategy, DDPS"):
            fuse(own)

    @pytest.mark.parametrize("function", [fuse, unfuse])
    def test_what_is_no_fabric(self, function: Any) -> None:
        with pytest.raises(TypeError, match=r"expected a lightning.Fabric; got torch.Linear"):
            function(nn.Linear(1, 1))


def test_a_checkpoint_of_the_stock_optimizer_is_resumed_and_the_other_way_round(tmp_path: Any) -> None:
    whole = Run(stock, "16-mixed")
    for _ in range(2):
        whole.train(lambda: whole.clip(max_norm=0.5), steps=5)
    for first, second in ((stock, fused), (fused, stock), (fused, fused)):
        run = Run(first, "16-mixed")
        run.train(lambda run=run: run.clip(max_norm=0.5), steps=5)
        run.fabric.save(tmp_path / "file.ckpt", {"model": run.model, "optimizer": run.optimizer})
        other = Run(second, "16-mixed")
        other.fabric.load(tmp_path / "file.ckpt", {"model": other.model, "optimizer": other.optimizer})
        other.train(lambda other=other: other.clip(max_norm=0.5), steps=5)
        other.assert_same(whole)
