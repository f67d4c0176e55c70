"""FusedClipping around a fit: resuming, undoing, strategies."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

from lightning_cases import (
    STEPS,
    WARNINGS,
    LooksItself,
    Net,
    assert_same,
    batches,
    fit,
    fused,
    overflow,
    pl,
    scale_of,
    stock,
    trainer,
)

import fusedopt
from fusedopt.integrations.lightning import FusedClipping

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


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
