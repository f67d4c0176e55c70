"""FusedClipping in Lightning's Trainer: the numbers of the stock optimizer, without its passes over the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

from lightning_cases import (
    CLIP_IDS,
    CLIPS,
    OVERFLOW,
    PRECISIONS,
    SCALE,
    STEPS,
    WARNINGS,
    ByHand,
    Net,
    assert_same,
    batches,
    fit,
    fused,
    overflow,
    scale_of,
    stock,
)
from probe import GradientPasses

import fusedopt

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.mark.parametrize("clip", CLIPS, ids=CLIP_IDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_numbers_and_no_pass_over_the_gradients(precision: str, clip: dict[str, Any]) -> None:
    net, want = Net(fused, overflow(precision)), Net(stock, overflow(precision))
    with GradientPasses(net.parameters()) as passes:
        own = fit(net, precision, **clip)
    other = fit(want, precision, callbacks=[], **clip)
    assert_same(net, want)
    assert passes.seen == []
    assert scale_of(own) == scale_of(other) == (SCALE / 2 if precision == "16-mixed" else None)
    assert own.global_step == other.global_step == STEPS
    assert net.optimizers().last_step.grad_norm is not None or "norm" not in str(clip.get("gradient_clip_algorithm"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_probe_sees_what_the_stock_way_does(precision: str) -> None:
    net = Net(stock, overflow(precision))
    with GradientPasses(net.parameters()) as passes:
        fit(net, precision, callbacks=[], gradient_clip_val=0.5)
    assert {"aten._foreach_norm.Scalar", "aten._foreach_mul_.Tensor"} < set(passes.seen)
    assert (precision == "16-mixed") == any("unscale" in name for name in passes.seen)


@pytest.mark.parametrize("clip", CLIPS, ids=CLIP_IDS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_accumulation(precision: str, clip: dict[str, Any]) -> None:
    net, want = Net(fused, overflow(precision)), Net(stock, overflow(precision))
    data = batches(2 * STEPS)
    with GradientPasses(net.parameters()) as passes:
        fit(net, precision, data, accumulate_grad_batches=2, **clip)
    fit(want, precision, data, callbacks=[], accumulate_grad_batches=2, **clip)
    assert_same(net, want)
    assert passes.seen == []


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_step_without_a_loss_makes_no_step(precision: str) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, index: int) -> Any:
            return None if index in (3, 4) else super().training_step(batch, index)

    net, want = Skips(fused), Skips(stock)
    fit(net, precision, gradient_clip_val=0.5)
    fit(want, precision, callbacks=[], gradient_clip_val=0.5)
    assert_same(net, want)


class TestByHand:
    @pytest.mark.parametrize("clip", [None, (0.5, "norm"), (0.01, "value")], ids=CLIP_IDS)
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_the_same_numbers_and_no_pass(self, precision: str, clip: Any) -> None:
        net, want = ByHand(fused), ByHand(stock)
        net.clip = want.clip = clip
        with GradientPasses(net.parameters()) as passes:
            fit(net, precision)
        fit(want, precision, callbacks=[])
        assert_same(net, want)
        assert passes.seen == []

    @pytest.mark.parametrize("unscale", ["never", "before", "after", "before in the wrapper", "after in the wrapper"])
    @pytest.mark.parametrize("clip", [(0.5, "norm"), (0.01, "value")], ids=CLIP_IDS[1:])
    def test_a_scaled_gradient_is_clipped_as_it_will_be_without_the_scale(self, clip: Any, unscale: str) -> None:
        """Stock Lightning clips the scaled gradients here, and lets nobody unscale by hand."""

        class Own(ByHand):
            def unscale(self, optimizer: Any) -> None:
                scaler = self.trainer.precision_plugin.scaler
                scaler.unscale_(optimizer if "wrapper" in unscale else optimizer.optimizer)

            def before_step(self, optimizer: Any) -> None:
                if "before" in unscale:
                    self.unscale(optimizer)
                super().before_step(optimizer)
                if "after" in unscale:
                    self.unscale(optimizer)

        class ClipsInTime(ByHand):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                if clip[1] == "norm":
                    torch.nn.utils.clip_grad_norm_(self.parameters(), clip[0])
                else:
                    torch.nn.utils.clip_grad_value_(self.parameters(), clip[0])

        net, want = Own(fused, OVERFLOW), ClipsInTime(stock, OVERFLOW)
        net.clip = clip
        with GradientPasses(net.parameters()) as passes:
            own = fit(net, "16-mixed")
        other = fit(want, "16-mixed", callbacks=[])
        assert_same(net, want)
        assert scale_of(own) == scale_of(other) == SCALE / 2
        assert len(passes.seen) == (0 if unscale == "never" else STEPS)

    def test_a_hook_that_manual_optimization_does_not_call(self) -> None:
        class Own(ByHand):
            clip = (0.5, "norm")

            def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
                raise AssertionError

        net, want = Own(fused), Own(stock)
        with GradientPasses(net.parameters()) as passes:
            fit(net)
        fit(want, callbacks=[])
        assert_same(net, want)
        assert passes.seen == []

    def test_several_optimizers_and_a_stock_one_beside(self) -> None:
        class Three(ByHand):
            def configure_optimizers(self) -> Any:
                first, _, last = self.layers
                return [self.make([first.weight]), self.make([first.bias]), stock(last.parameters())]

            def training_step(self, batch: Any, index: int) -> None:
                self.batch = index
                optimizers = self.optimizers()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                self.clip_gradients(optimizers[0], 0.1, "norm")
                self.clip_gradients(optimizers[1], 0.01, "value")
                self.clip_gradients(optimizers[2], 0.2, "norm")
                for optimizer in optimizers[: 2 if index % 2 else 3]:
                    optimizer.step()

        net, want = Three(fused), Three(stock)
        seen = [net.layers[0].weight, net.layers[0].bias]
        with GradientPasses(seen) as passes, GradientPasses(net.layers[2].parameters()) as others:
            fit(net, steps=2 * STEPS)
        fit(want, callbacks=[], steps=2 * STEPS)
        assert_same(net, want)
        assert passes.seen == [] and "aten._foreach_norm.Scalar" in others.seen

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_clipping_twice_skipping_a_step_and_a_closure(self, precision: str) -> None:
        class Odd(ByHand):
            def training_step(self, batch: Any, index: int) -> None:
                self.batch = index
                optimizer = self.optimizers()

                def closure() -> None:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    if self.make is fused or precision != "16-mixed":
                        self.clip_gradients(optimizer, 0.05, "value")
                        self.clip_gradients(optimizer, 0.1, "norm")

                if index % 4 == 3:
                    closure()
                else:
                    optimizer.step(closure=closure)

        class ClipsInTime(Odd):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                torch.nn.utils.clip_grad_value_(self.parameters(), 0.05)
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)

        net = Odd(fused, overflow(precision))
        want = (ClipsInTime if precision == "16-mixed" else Odd)(stock, overflow(precision))
        data = batches(STEPS * 2)
        fit(net, precision, data)
        fit(want, precision, data, callbacks=[])
        assert_same(net, want)

    def test_to_clip_between_two_backward_passes_is_refused(self) -> None:
        class Twice(ByHand):
            def before_step(self, optimizer: Any) -> None:
                self.clip_gradients(optimizer, 0.5, "norm")
                self.manual_backward(self.loss(batches()[0]))

        with pytest.raises(RuntimeError, match="written to since it was told to"):
            fit(Twice(fused))


class TestClipGradOfItsOwn:
    @staticmethod
    def make(params: Any) -> Any:
        return fusedopt.FusedAdamW(params, lr=1e-2, clip_grad=dict(max_norm=0.5))

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_serves_where_the_trainer_does_not_clip(self, precision: str) -> None:
        net, want = Net(self.make, overflow(precision)), Net(stock, overflow(precision))
        fit(net, precision)
        fit(want, precision, callbacks=[], gradient_clip_val=0.5)
        assert_same(net, want)

    @pytest.mark.parametrize("own_way", [False, True])
    def test_is_refused_where_it_does(self, own_way: bool) -> None:
        class Own(Net):
            def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
                self.clip_gradients(*args, **kwargs)

        with pytest.raises(ValueError, match=r"clips, and FusedAdamW has clip_grad=.*'max_norm': 0.5"):
            fit((Own if own_way else Net)(self.make), gradient_clip_val=0.5)


def test_bad_settings() -> None:
    class Own(ByHand):
        clip = (float("nan"), "norm")

    with pytest.raises(ValueError, match="max_norm: nan"):
        fit(Own(fused))


def test_a_model_without_gradients_is_no_trouble() -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return self.make([nn.Parameter(torch.ones(3)), *self.layers[2].parameters()])

    net, want = Frozen(fused), Frozen(stock)
    fit(net, gradient_clip_val=0.5)
    fit(want, callbacks=[], gradient_clip_val=0.5)
    assert_same(net, want)
