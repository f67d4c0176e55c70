"""FusedClipping in Lightning's Trainer: the numbers of the stock optimizer, without its passes over the gradients."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

from lightning_cases import (
    OVERFLOW,
    PRECISIONS,
    SCALE,
    STEPS,
    ByHand,
    MixedPrecision,
    Net,
    assert_same,
    batches,
    fit,
    fused,
    pl,
    stock,
    trainer,
)
from probe import GradientPasses

import fusedopt
from fusedopt.integrations.lightning import FusedClipping

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)

CLIPS: list[dict[str, Any]] = [
    {},
    dict(gradient_clip_val=0.5),
    dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
]
CLIP_IDS = ["none", "norm", "value"]


def overflow(precision: str) -> int | None:
    return OVERFLOW if precision == "16-mixed" else None


def scale_of(own: pl.Trainer) -> float | None:
    scaler = getattr(own.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.get_scale()


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


class Looks(pl.Callback):
    """Notes the gradients that on_before_optimizer_step sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, own: Any, module: Any, optimizer: Any) -> None:
        self.seen.append(module.grads())


class LooksItself(Net):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(self.grads())


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


class TestResuming:
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    @pytest.mark.parametrize(("first", "second"), [(fused, fused), (stock, fused), (fused, stock)])
    @pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
    def test_from_a_checkpoint(self, first: Any, second: Any, precision: str, tmp_path: Any) -> None:
        def callbacks(make: Any) -> list[Any]:
            return [FusedClipping()] if make is fused else []

        want = Net(stock, overflow(precision))
        other = fit(want, precision, callbacks=[], gradient_clip_val=0.5)
        net = Net(first, overflow(precision))
        saves = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
        fit(
            net,
            precision,
            batches()[:10],
            callbacks=[saves, *callbacks(first)],
            enable_checkpointing=True,
            steps=10,
            gradient_clip_val=0.5,
        )
        path = saves.best_model_path
        keys = torch.load(path, weights_only=False)
        assert ("MixedPrecision" in keys) == (precision == "16-mixed")
        net = Net(second)
        own = fit(
            net,
            precision,
            batches()[10:],
            path,
            callbacks=[saves, *callbacks(second)],
            enable_checkpointing=True,
            gradient_clip_val=0.5,
        )
        assert_same(net, want)
        assert scale_of(own) == scale_of(other) and own.global_step == STEPS

    def test_a_schedule_is_monitored(self, tmp_path: Any) -> None:
        class Scheduled(Net):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        class Logger(pl.loggers.CSVLogger):
            def log_metrics(self, metrics: Any, step: Any = None) -> None:
                seen.append(metrics)

        seen: list[Any] = []
        net, want = Scheduled(fused), Scheduled(stock)
        monitor = pl.callbacks.LearningRateMonitor()
        settings = dict(logger=Logger(tmp_path), log_every_n_steps=1, gradient_clip_val=0.5)
        fit(net, callbacks=[FusedClipping(), monitor], **settings)
        rates = [metrics["lr-FusedAdamW"] for metrics in seen if "lr-FusedAdamW" in metrics]
        assert rates == pytest.approx([1e-2 * 0.9**step for step in range(STEPS)])
        fit(want, callbacks=[])
        assert not any(map(torch.equal, net.parameters(), want.parameters()))
        want = Scheduled(stock)
        fit(want, callbacks=[], gradient_clip_val=0.5)
        assert_same(net, want)


class TestUndoing:
    def test_after_the_fit(self) -> None:
        own = trainer("16-mixed", gradient_clip_val=0.5, callbacks=[FusedClipping(), FusedClipping()])
        plugin = own.precision_plugin
        scaler, before = plugin.scaler, dict(vars(plugin))
        seen: list[Any] = []

        class Asks(Net):
            def on_train_start(self) -> None:
                seen.append((type(scaler), set(vars(plugin)) - set(before)))

        net = Asks(fused)
        loader = torch.utils.data.DataLoader(batches(), batch_size=None)
        for repeat in range(2):
            own.fit_loop.epoch_loop.max_steps = 5 * (repeat + 1)
            own.fit(net, loader)
            assert vars(plugin) == before and type(scaler) is torch.amp.GradScaler
        assert seen == [(fusedopt.amp.GradScaler, {"clip_gradients", "optimizer_step", "_fusedopt_replaced"})] * 2
        assert net.optimizers().optimizer._shared.takes_scale is None

    @pytest.mark.parametrize("looks", [False, True])
    def test_after_an_error(self, looks: bool) -> None:
        class Fails(LooksItself if looks else Net):
            def on_before_zero_grad(self, optimizer: Any) -> None:
                if self.batch == 3:
                    raise ArithmeticError("planted")

        own = trainer("16-mixed", gradient_clip_val=0.5)
        plugin, net = own.precision_plugin, Fails(fused)
        before = dict(vars(plugin))
        with pytest.raises(ArithmeticError, match="planted"):
            own.fit(net, torch.utils.data.DataLoader(batches(), batch_size=None))
        assert vars(plugin) == before and type(plugin.scaler) is torch.amp.GradScaler
        assert own.optimizers[0]._shared.takes_scale is None

    def test_a_fit_that_never_ended_leaves_nothing_to_the_next(self) -> None:
        own = trainer(gradient_clip_val=0.5)
        for _ in range(2):
            FusedClipping().setup(own, None, "fit")
        plugin = own.precision_plugin
        assert plugin.clip_gradients.args[1] == type(plugin).clip_gradients.__get__(plugin)
        assert plugin.optimizer_step.args[1] == type(plugin).optimizer_step.__get__(plugin)

    def test_somebody_elses_methods_come_back(self) -> None:
        own = trainer(gradient_clip_val=0.5)
        calls: list[Any] = []
        mine = own.precision_plugin.clip_gradients = lambda *args: calls.append(args)
        own.fit(Net(stock), torch.utils.data.DataLoader(batches(), batch_size=None))
        assert own.precision_plugin.clip_gradients is mine
        assert len(calls) == STEPS

    def test_only_a_fit_changes_anything(self) -> None:
        own = trainer()
        before = dict(vars(own.precision_plugin))

        class Validates(Net):
            def validation_step(self, batch: Any, index: int) -> None:
                assert vars(own.precision_plugin) == before

        own.validate(Validates(), torch.utils.data.DataLoader(batches(1), batch_size=None), verbose=False)

    def test_nothing_keeps_a_trainer_alive(self) -> None:
        own = fit(Net(fused), steps=1)
        plugin = weakref.ref(own.precision_plugin)
        del own
        gc.collect()
        assert plugin() is None


class TestStrategies:
    def test_which_are_served(self) -> None:
        from lightning.pytorch import strategies

        from fusedopt.integrations.lightning_parts.clipping import serves_strategy

        class Mine(strategies.DDPStrategy):
            pass

        every = [
            each
            for each in vars(strategies).values()
            if isinstance(each, type) and issubclass(each, strategies.Strategy)
        ]
        served = {each.__name__ for each in [*every, Mine] if serves_strategy(("lightning",), each)}
        assert served == {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy", "Mine"}
        assert len(every) > 7

    @pytest.mark.parametrize("make", [fused, stock])
    def test_others_are_refused_by_name_if_an_optimizer_is_fused(self, make: Any) -> None:
        from lightning.pytorch import strategies

        single = strategies.SingleDeviceStrategy
        methods = {name: value for name, value in vars(single).items() if name not in ("__dict__", "__weakref__")}
        methods.pop("__init__")
        kind = type("OddStrategy", (strategies.Strategy,), methods)
        odd = kind()
        odd._root_device, odd.global_rank, odd.local_rank, odd.world_size = torch.device("cpu"), 0, 0, 1
        settings = dict(strategy=odd, gradient_clip_val=0.5)
        if make is fused:
            with pytest.raises(ValueError, match="does not serve FusedAdamW under OddStrategy; expected Single"):
                fit(Net(make), **settings)
        else:
            net, want = Net(make), Net(make)
            fit(net, **settings)
            fit(want, callbacks=[], gradient_clip_val=0.5)
            assert all(map(torch.equal, net.parameters(), want.parameters()))


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
