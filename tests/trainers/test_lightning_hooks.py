"""FusedClipping where somebody looks at the gradients, or clips or scales them in a way of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
    LooksItself,
    MixedPrecision,
    Net,
    assert_same,
    fit,
    fused,
    overflow,
    pl,
    scale_of,
    stock,
)
from probe import GradientPasses

import fusedopt
from fusedopt.integrations.lightning import FusedClipping

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


class Looks(pl.Callback):
    """Notes the gradients that on_before_optimizer_step sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, own: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(module.grads())


def assert_saw_the_same(seen: list[Any], want: list[Any]) -> None:
    assert len(seen) == len(want) >= STEPS
    torch.testing.assert_close(seen, want, rtol=1e-4, atol=1e-5, equal_nan=True)


class TestWhoLooks:
    """Hooks see what they see with a stock optimizer: see Note [Who looks at the gradients]."""

    @pytest.mark.parametrize("clip", CLIPS, ids=CLIP_IDS)
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_before_the_step(self, precision: str, clip: dict[str, Any]) -> None:
        net, want = LooksItself(fused, overflow(precision)), LooksItself(stock, overflow(precision))
        ours, theirs = Looks(), Looks()
        with GradientPasses(net.parameters()) as passes:
            fit(net, precision, callbacks=[ours, FusedClipping()], **clip)
        fit(want, precision, callbacks=[theirs], **clip)
        assert_same(net, want)
        for seen in (net.seen, ours.seen):
            assert_saw_the_same(seen, want.seen)
        assert_saw_the_same(theirs.seen, want.seen)
        beside = [name for name in passes.seen if "clone" not in name]
        assert len(beside) == (STEPS if precision == "16-mixed" else 0)

    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    @pytest.mark.parametrize("clip", [(0.5, "norm"), (0.01, "value")], ids=CLIP_IDS[1:])
    @pytest.mark.parametrize("within", [False, True])
    def test_what_was_clipped_by_hand(self, precision: str, clip: Any, within: bool) -> None:
        class Own(ByHand, LooksItself):
            def training_step(self, batch: Any, index: int) -> None:
                self.batch = index
                optimizer = self.optimizers()

                def closure() -> None:
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    # Stock Lightning clips what is scaled
                    scale = self.trainer.precision_plugin.scaler.get_scale() if precision == "16-mixed" else 1.0
                    self.clip_gradients(optimizer, clip[0] * (1.0 if self.make is fused else scale), clip[1])

                if within:
                    optimizer.step(closure=closure)
                else:
                    closure()
                    optimizer.step()

        net, want = Own(fused), Own(stock)
        fit(net, precision)
        fit(want, precision, callbacks=[])
        assert_same(net, want)
        assert_saw_the_same(net.seen, want.seen)

    def test_an_overflow_is_noticed_when_clipped_by_value_before(self) -> None:
        class Own(ByHand, LooksItself):
            clip = (0.01, "value")

        net = Own(fused, 0)
        before = [param.clone() for param in net.parameters()]
        own = fit(net, "16-mixed", steps=1)
        assert scale_of(own) == SCALE / 2
        assert all(map(torch.equal, before, net.parameters()))

    def test_what_was_unscaled_by_hand(self) -> None:
        class Own(ByHand, LooksItself):
            clip = (0.5, "norm")

            def before_step(self, optimizer: Any) -> None:
                self.trainer.precision_plugin.scaler.unscale_(optimizer)
                super().before_step(optimizer)

        class ClipsInTime(ByHand):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.seen: list[Any] = []

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)
                self.seen.append(self.grads())

        net, want = Own(fused, OVERFLOW), ClipsInTime(stock, OVERFLOW)
        own = fit(net, "16-mixed")
        other = fit(want, "16-mixed", callbacks=[])
        assert_same(net, want)
        assert scale_of(own) == scale_of(other) == SCALE / 2
        for seen, expected in zip(net.seen, want.seen, strict=True):
            if all(grad.isfinite().all() for grad in expected):
                torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_an_own_way_to_clip(self, precision: str, algorithm: str) -> None:
        class Own(LooksItself):
            def configure_gradient_clipping(
                self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any
            ) -> None:
                torch.nn.utils.clip_grad_norm_(self.layers[0].parameters(), 0.3)  # a part
                self.seen.append(self.grads())
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
                self.seen.append(self.grads())

        clip = dict(gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)
        net, want = Own(fused, overflow(precision)), Own(stock, overflow(precision))
        own = fit(net, precision, **clip)
        other = fit(want, precision, callbacks=[], **clip)
        assert_same(net, want)
        assert_saw_the_same(net.seen, want.seen)
        assert scale_of(own) == scale_of(other)

    @pytest.mark.parametrize(
        ("precision", "kind", "lines"),
        [
            ("16-mixed", Net, 0),
            ("32-true", LooksItself, 0),
            ("bf16-mixed", LooksItself, 0),
            ("16-mixed", LooksItself, 1),
        ],
    )
    def test_one_line_says_that_and_why(
        self, precision: str, kind: Any, lines: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []
        monkeypatch.setattr(pl.utilities, "rank_zero_info", said.append)
        fit(kind(fused), precision, steps=3)
        assert len(said) == lines
        if lines:
            assert said[0] == (
                "FusedClipping: Lightning unscales the gradients of FusedAdamW before the step, in a pass of its own, "
                "because LooksItself has the hook on_before_optimizer_step"
            )

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_after_a_step_that_writes_back(self, precision: str) -> None:
        class LooksAfterwards(Net):
            def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
                seen[self.make].append(self.grads())

        def writes_back(params: Any) -> Any:
            return fusedopt.FusedAdamW(params, lr=1e-2, write_back_grads=True)

        seen: dict[Any, list[Any]] = {writes_back: [], stock: []}
        for make in seen:
            fit(LooksAfterwards(make), precision, gradient_clip_val=0.5)
        assert_saw_the_same(seen[writes_back], seen[stock])


class OddScaler(torch.amp.GradScaler):
    """Another class than torch's; it notes what it unscales."""

    unscaled = 0

    def unscale_(self, optimizer: Any) -> None:
        self.unscaled += 1
        super().unscale_(optimizer)


class TestStockWays:
    @pytest.mark.parametrize("clip", [(0.5, "norm"), (0.01, "value")], ids=CLIP_IDS[1:])
    @pytest.mark.parametrize("kind", [Net, ByHand])
    def test_a_scaler_of_another_class(self, kind: Any, clip: Any) -> None:
        net, want = kind(fused, OVERFLOW), kind(stock, OVERFLOW)
        for each, callbacks in ((net, [FusedClipping()]), (want, [])):
            scaler = OddScaler("cpu", init_scale=SCALE)
            settings = {} if kind is ByHand else dict(gradient_clip_val=clip[0], gradient_clip_algorithm=clip[1])
            each.clip = clip
            fit(each, MixedPrecision("16-mixed", "cpu", scaler), callbacks=callbacks, **settings)
            assert type(scaler) is OddScaler and scaler.unscaled == STEPS
            # Stock Lightning does not see the overflow that was clipped by value while it was scaled.
            assert scaler.get_scale() == (SCALE / 2 if settings or clip[1] == "norm" else scaler.get_scale())
        assert_same(net, want)

    def test_a_plugin_that_clips_in_its_own_way(self) -> None:
        class Plugin(MixedPrecision):
            def clip_grad_by_norm(self, optimizer: Any, clip_val: Any) -> None:
                torch.nn.utils.clip_grad_norm_(self.main_params(optimizer), clip_val, norm_type=1.0)

        net, want = Net(fused, OVERFLOW), Net(stock, OVERFLOW)
        for each, callbacks in ((net, [FusedClipping()]), (want, [])):
            plugin = Plugin("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))
            fit(each, plugin, callbacks=callbacks, gradient_clip_val=0.5)
        assert_same(net, want)

    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_a_stock_optimizer_is_left_alone(self, precision: str) -> None:
        nets = [Net(stock, overflow(precision)) for _ in range(2)]
        seen = []
        for net, callbacks in zip(nets, ([FusedClipping()], []), strict=True):
            with GradientPasses(net.parameters()) as passes:
                fit(net, precision, callbacks=callbacks, gradient_clip_val=0.5)
            seen.append(passes.seen)
        assert seen[0] == seen[1] != []
        assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
