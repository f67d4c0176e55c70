"""What would never act, or not as its config says, is told before a training begins."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from engine_cases import PointNet, by_iterations, config, loader, scalars, train

from fusedopt import FusedSGD
from fusedopt.training.engine import Hook, Runner
from fusedopt.training.registry import PARAM_SCHEDULERS
from fusedopt.training.schedulers import StepLR
from fusedopt.training.wrappers import OptimWrapper, SkipAwareScheduler


def warnings_of(cfg: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Runner.from_cfg(cfg)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


PLATEAUS = sorted(name for name in PARAM_SCHEDULERS if getattr(PARAM_SCHEDULERS.get(name), "need_val_args", False))


def plateau(name: str, **settings: Any) -> dict[str, Any]:
    extra = dict(param_name="lr") if name.endswith("ParamScheduler") else {}
    return dict(type=name, monitor="accuracy", **extra, **settings)


class TestMetricsThatDoNotCome:
    """Schedulers that look at metrics."""

    def test_there_are_four(self) -> None:
        assert len(PLATEAUS) == 4

    @pytest.mark.parametrize("name", PLATEAUS)
    def test_a_run_without_validation(self, name: str, tmp_path: Any) -> None:
        schedulers = [dict(type="StepLR", step_size=1), plateau(name, patience=0)]
        (message,) = warnings_of(config(tmp_path, validates=False, param_scheduler=schedulers))
        assert f"param_scheduler.1 ({name}) monitors 'accuracy' of the validations, but there are none" in message
        assert "so it never acts; expected val_dataloader, val_cfg and val_evaluator" in message
        assert warnings_of(config(tmp_path, param_scheduler=schedulers)) == []

    @pytest.mark.parametrize(
        ("settings", "train_cfg", "looks"),
        [
            (dict(patience=2), {}, 3),  # the last of four epochs is not before its end
            (dict(patience=0), dict(val_interval=2), 1),
            (dict(patience=0, end=100), dict(val_begin=4), 1),
            (dict(patience=0, begin=3), {}, 1),
        ],
    )
    def test_too_few_validations(self, settings: Any, train_cfg: Any, looks: int, tmp_path: Any) -> None:
        changes = dict(train_cfg=dict(by_epoch=True, max_epochs=4, **train_cfg))
        entry = plateau("ReduceOnPlateauLR", factor=0.5, rule="less", threshold=10.0, threshold_rule="abs", **settings)
        cfg = config(tmp_path, param_scheduler=[entry], **changes)
        (message,) = warnings_of(cfg)
        assert f"of which {looks} {'is' if looks == 1 else 'are'} in its span from begin=" in message
        with pytest.warns(UserWarning, match="never acts"):
            runner = train(cfg)
        assert runner.optim_wrapper.get_lr()["lr"] == [1e-2], "as it said"

    def test_just_enough_validations(self, tmp_path: Any) -> None:
        """A metric never improves by 10, so that the value is reduced at the last one that is looked at."""
        entry = plateau("ReduceOnPlateauLR", factor=0.5, rule="less", threshold=10.0, threshold_rule="abs", patience=1)
        runner = train(config(tmp_path, param_scheduler=[entry]))
        assert runner.optim_wrapper.get_lr()["lr"] == [0.5e-2]

    def test_training_by_iterations(self, tmp_path: Any) -> None:
        entry = plateau("ReduceOnPlateauLR", patience=2)
        assert warnings_of(config(tmp_path, **by_iterations(param_scheduler=entry))) == []
        entry = plateau("ReduceOnPlateauLR", patience=3)
        (message,) = warnings_of(config(tmp_path, **by_iterations(param_scheduler=entry)))
        assert "of which 4 are in its span" in message and "at least 5, patience=3 + 2" in message

    def test_one_of_several_optimizers(self, tmp_path: Any) -> None:
        wrapper = dict(
            constructor="MultiOptimWrapperConstructor",
            backbone=dict(optimizer=dict(type="FusedSGD", lr=0.1)),
            head=dict(optimizer=dict(type="FusedSGD", lr=0.1)),
        )
        cfg = config(
            tmp_path,
            validates=False,
            optim_wrapper=wrapper,
            param_scheduler=dict(backbone=[], head=[plateau("ReduceOnPlateauLR")]),
        )
        (message,) = warnings_of(cfg)
        assert message.startswith("param_scheduler.head.0 (ReduceOnPlateauLR)")


class TestEpochsThatDoNotEnd:
    """Training by iterations with ``by_epoch`` left True."""

    def iterations(self, tmp_path: Any, **changes: Any) -> dict[str, Any]:
        return config(tmp_path, **{**by_iterations(), **changes})

    def test_nothing_to_warn_of(self, tmp_path: Any) -> None:
        assert warnings_of(self.iterations(tmp_path)) == []
        assert warnings_of(config(tmp_path)) == [], "training by epochs"

    def test_one_warning_names_all(self, tmp_path: Any) -> None:
        class Mine(Hook):
            by_epoch = True

        cfg = self.iterations(
            tmp_path,
            param_scheduler=[
                dict(type="LinearLR", start_factor=0.1, end=6),
                dict(type="PolyLR", by_epoch=False, begin=6),
                dict(type="StepMomentum", step_size=1),
            ],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=5), logger=dict(type="LoggerHook")),
            log_processor=dict(by_epoch=True),
            custom_hooks=[Mine()],
        )
        (message,) = warnings_of(cfg)
        for clause in (
            "train_cfg.max_iters=20",
            "param_scheduler.0 (LinearLR, by_epoch=True) makes no step before the end",
            "param_scheduler.2 (StepMomentum, by_epoch=True)",
            "CheckpointHook (by_epoch=True) writes checkpoints once, at the end",
            "LoggerHook (log_metric_by_epoch=True) logs the metrics of all validations at step 0",
            "Mine (by_epoch=True)",
            "log_processor (by_epoch=True)",
            "Expected by_epoch=False",
        ):
            assert clause in message
        assert "PolyLR" not in message

    def test_it_is_as_it_says(self, tmp_path: Any) -> None:
        cfg = self.iterations(
            tmp_path,
            param_scheduler=dict(type="LinearLR", start_factor=0.1, end=6),
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", interval=5),
                logger=dict(type="LoggerHook", log_metric_by_epoch=False),
            ),
        )
        rates = []

        class Watch(Hook):
            def before_train_iter(self, runner, batch_idx, data_batch=None):
                rates.append(runner.optim_wrapper.get_lr()["lr"][0])

        with pytest.warns(UserWarning, match=re.escape("param_scheduler.0 (LinearLR")):
            train(cfg, Watch())
        assert len(set(rates)) == 1 and rates[0] == pytest.approx(1e-3)
        assert len(list(tmp_path.glob("*.pth"))) == 1

    @pytest.mark.parametrize(
        ("hooks", "named"),
        [
            (dict(checkpoint=None, logger=None), None),
            (dict(checkpoint=dict(type="CheckpointHook"), logger=None), None),  # the last one was asked for
            (dict(checkpoint=None, logger=dict(type="LoggerHook")), "LoggerHook"),
            (dict(checkpoint=dict(type="CheckpointHook", interval=2, save_last=False), logger=None), "never"),
        ],
    )
    def test_what_is_meant_is_no_mistake(self, hooks: Any, named: str | None, tmp_path: Any) -> None:
        messages = warnings_of(self.iterations(tmp_path, default_hooks=hooks))
        assert messages == [] if named is None else named in messages[0]

    def test_a_logger_without_validations_and_a_scheduler_in_another(self, tmp_path: Any) -> None:
        model = PointNet()
        wrapper = OptimWrapper(FusedSGD(model.parameters(), lr=0.1))
        aware = SkipAwareScheduler(StepLR(wrapper, step_size=1), wrapper)
        changes = by_iterations(param_scheduler=[aware], default_hooks=dict(checkpoint=None))
        cfg = config(tmp_path, validates=False, model=model, optim_wrapper=wrapper, **changes)
        (message,) = warnings_of(cfg)
        assert "param_scheduler.0 (StepLR, by_epoch=True)" in message and "LoggerHook" not in message

    def test_the_default_hooks(self, tmp_path: Any) -> None:
        """The logger is the Runner's to set; that there is one checkpoint alone is for the user to know."""
        cfg = self.iterations(tmp_path, default_hooks={})
        (message,) = warnings_of(cfg)
        assert "CheckpointHook" in message and "LoggerHook" not in message
        cfg["default_hooks"] = dict(checkpoint=None)
        train(cfg)
        steps = [line["step"] for line in scalars(tmp_path) if "accuracy" in line]
        assert steps == [5, 10, 15, 20]

    def test_finite_data(self, tmp_path: Any) -> None:
        cfg = self.iterations(tmp_path, train_dataloader=loader(40, 8, shuffle=True))
        assert warnings_of(cfg) == []
