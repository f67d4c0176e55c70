"""Hooks: stages, priorities, defaults, and what each of the small ones does."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch
from engine_cases import PointNet, Points, by_iterations, config, loader, recorded, scalars, train

from fusedopt.training.engine import EmptyCacheHook, Hook, MessageHub, Priority, Runner, SyncBuffersHook
from fusedopt.training.engine.hooks import get_priority
from fusedopt.training.registry import HOOKS

DEFAULTS = {
    "RuntimeInfoHook": 10,
    "IterTimerHook": 50,
    "DistSamplerSeedHook": 50,
    "LoggerHook": 60,
    "ParamSchedulerHook": 70,
    "CheckpointHook": 90,
}


def order(runner: Runner) -> list[tuple[str, int]]:
    return [(type(hook).__name__, get_priority(hook.priority)) for hook in runner.hooks]


class Tracer(Hook):
    """Every stage that is called, with what tells one from the other."""

    def __init__(self) -> None:
        self.trace: list[tuple] = []

    def __getattribute__(self, name):
        if name in Hook.stages:
            return lambda runner, **kwargs: self.trace.append((name, runner.epoch, runner.iter, sorted(kwargs)))
        return super().__getattribute__(name)


def test_a_hook_of_ones_own_has_the_name_of_one_that_we_provide_for_others(tmp_path, monkeypatch):
    for name in ("_modules", "_replaceable"):
        monkeypatch.setattr(HOOKS, name, getattr(HOOKS, name).copy())

    @HOOKS.register_module()
    class SegVisualizationHook(Hook):
        def __init__(self, thickness):
            self.thickness = thickness

    hook = dict(type="SegVisualizationHook", thickness=3)
    runner = Runner.from_cfg(config(tmp_path, default_hooks=dict(visualization=hook)))
    assert [each.thickness for each in runner.hooks if type(each) is SegVisualizationHook] == [3]
    with pytest.raises(KeyError, match="'CheckpointHook' is already in"):
        HOOKS.register_module(name="CheckpointHook", module=SegVisualizationHook)


class TestPriorities:
    def test_the_defaults(self, tmp_path):
        assert order(Runner.from_cfg(config(tmp_path))) == list(DEFAULTS.items())

    @pytest.mark.parametrize("name", ["SyncBuffersHook", "EmptyCacheHook", "VisualizationHook", "SegVisualizationHook"])
    def test_the_others_are_normal(self, name):
        assert get_priority(HOOKS.build(dict(type=name)).priority) == 50

    def test_equal_priorities_act_in_the_order_of_registration(self, tmp_path):
        class A(Hook):
            priority = "LOWEST"

        class B(Hook):
            priority = 100

        class C(Hook):
            priority = "HIGHEST"

        runner = Runner.from_cfg(
            config(tmp_path, custom_hooks=[B(), A(), C(), dict(type=A, priority="HIGHEST"), dict(type=B, priority=55)])
        )
        names = [name for name, _ in order(runner)]
        assert names[:3] == ["C", "A", "RuntimeInfoHook"] and names[-2:] == ["B", "A"]
        assert names[names.index("DistSamplerSeedHook") + 1] == "B"
        runner.register_hook(A(), priority="very_high")
        assert [name for name, _ in order(runner)][2:4] == ["RuntimeInfoHook", "A"]

    @pytest.mark.parametrize("priority", Priority)
    def test_names_and_numbers(self, priority):
        assert get_priority(priority.name.lower()) == get_priority(priority.value) == priority.value

    @pytest.mark.parametrize(
        ("priority", "error", "message"),
        [
            ("HIGHER", ValueError, "Invalid priority: 'HIGHER'; did you mean 'HIGH'?"),
            (101, ValueError, "Invalid priority: 101; expected a number from 0 to 100"),
            (-1, ValueError, "Invalid priority: -1"),
            (1.5, TypeError, "priority must be a name such as 'NORMAL' or a number"),
            (True, TypeError, "priority must be a name"),
        ],
    )
    def test_what_is_none(self, tmp_path, priority, error, message):
        with pytest.raises(error, match=re.escape(message)):
            Runner.from_cfg(config(tmp_path, custom_hooks=[dict(type="EmptyCacheHook", priority=priority)]))


class TestRegistration:
    def test_default_hooks_are_merged_by_key(self, tmp_path):
        hooks = dict(timer=None, logger=dict(type="LoggerHook", interval=7), more=dict(type="SyncBuffersHook"))
        runner = Runner.from_cfg(config(tmp_path, default_hooks=hooks))
        assert [name for name, _ in order(runner)] == [
            "RuntimeInfoHook", "DistSamplerSeedHook", "SyncBuffersHook", "LoggerHook", "ParamSchedulerHook",
            "CheckpointHook",
        ]  # fmt: skip
        assert next(hook.interval for hook in runner.hooks if type(hook).__name__ == "LoggerHook") == 7

    def test_a_hook_that_is_not_there_may_be_removed(self, tmp_path):
        assert len(Runner.from_cfg(config(tmp_path, default_hooks=dict(visualization=None))).hooks) == 6

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (dict(custom_hooks=[dict(type="LogerHook")]), KeyError, "did you mean 'LoggerHook'?"),
            (dict(default_hooks=dict(log=dict(type="LoggerHook", intervall=3))), TypeError, "did you mean 'interval'?"),
            (dict(custom_hooks=dict(type="EmptyCacheHook")), TypeError, "custom_hooks must be a list"),
            (dict(default_hooks=[dict(type="EmptyCacheHook")]), TypeError, "default_hooks must be a dict, got list"),
            (dict(custom_hooks=[dict(type=dict)]), TypeError, "hook must be a Hook or the config of one"),
            (dict(custom_hooks=["EmptyCacheHook"]), TypeError, "hook must be a Hook or the config of one"),
            (dict(custom_hooks=[dict(priority="LOW")]), KeyError, "hook config needs the key 'type'"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, tmp_path, changes, error, message):
        with pytest.raises(error, match=re.escape(message)):
            Runner.from_cfg(config(tmp_path, **changes))

    def test_the_users_dicts_are_not_changed(self, tmp_path):
        hook = dict(type="EmptyCacheHook", priority="LOW")
        Runner.from_cfg(config(tmp_path, custom_hooks=[hook]))
        assert hook == dict(type="EmptyCacheHook", priority="LOW")


class TestStages:
    def test_of_a_training_by_epochs(self, tmp_path):
        tracer = Tracer()
        changes = dict(
            train_dataloader=loader(16, 8, shuffle=True), val_dataloader=loader(8, 8, shuffle=False),
            param_scheduler=None,
            train_cfg=dict(by_epoch=True, max_epochs=2, val_begin=2),
        )  # fmt: skip
        Runner.from_cfg(config(tmp_path, custom_hooks=[tracer], **changes)).train()
        stages = [(stage, epoch, iteration) for stage, epoch, iteration, _ in tracer.trace]
        iterations = lambda epoch: [  # noqa: E731
            (f"{when}_train_iter", epoch, 2 * epoch + inner) for inner in (0, 1) for when in ("before", "after")
        ]
        assert stages == [
            ("before_run", 0, 0),
            ("before_train", 0, 0),
            ("before_train_epoch", 0, 0),
            *iterations(0),
            ("after_train_epoch", 0, 2),
            ("before_save_checkpoint", 0, 2),
            ("before_train_epoch", 1, 2),
            *iterations(1),
            ("after_train_epoch", 1, 4),
            ("before_save_checkpoint", 1, 4),
            *((stage, 2, 4) for stage in (
                "before_val", "before_val_epoch", "before_val_iter", "after_val_iter", "after_val_epoch", "after_val",
                "after_train", "after_run",
            )),
        ]  # fmt: skip
        arguments = {stage: names for stage, _, _, names in tracer.trace}
        assert arguments["before_train_iter"] == arguments["before_val_iter"] == ["batch_idx", "data_batch"]
        assert arguments["after_train_iter"] == arguments["after_val_iter"] == ["batch_idx", "data_batch", "outputs"]
        assert arguments["after_val_epoch"] == ["metrics"] and arguments["before_save_checkpoint"] == ["checkpoint"]

    def test_of_a_training_by_iterations_that_is_resumed(self, tmp_path):
        tracer = Tracer()
        changes = by_iterations(
            train_cfg=dict(by_epoch=False, max_iters=6, val_interval=4),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5)),
            val_dataloader=loader(8, 8, shuffle=False),
            param_scheduler=None,
        )
        train(config(tmp_path, **changes))
        (tmp_path / "last_checkpoint").write_text("iter_5.pth")
        changes["resume"] = True
        Runner.from_cfg(config(tmp_path, custom_hooks=[tracer], **changes)).train()
        assert [stage for stage, *_ in tracer.trace] == [
            "before_run", "after_load_checkpoint", "before_train", "before_train_epoch", "before_train_iter",
            "after_train_iter", "before_save_checkpoint", "before_val", "before_val_epoch", "before_val_iter",
            "after_val_iter", "after_val_epoch", "after_val", "after_train_epoch", "after_train", "after_run",
        ]  # fmt: skip

    def test_the_general_ones_with_their_mode(self, tmp_path):
        seen = []

        class General(Hook):
            def _before_epoch(self, runner, mode="train"):
                seen.append(("before_epoch", mode))

            def _after_epoch(self, runner, mode="train"):
                seen.append(("after_epoch", mode))

            def _before_iter(self, runner, batch_idx, data_batch=None, mode="train"):
                seen.append(("before_iter", mode))

            def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train"):
                seen.append(("after_iter", mode))

        changes = dict(
            train_dataloader=loader(8, 8, shuffle=True), val_dataloader=loader(8, 8, shuffle=False),
            param_scheduler=None,
            train_cfg=dict(by_epoch=True, max_epochs=1),
        )  # fmt: skip
        Runner.from_cfg(config(tmp_path, custom_hooks=[General()], **changes)).train()
        each = ("before_epoch", "before_iter", "after_iter", "after_epoch")
        assert seen == [(stage, mode) for mode in ("train", "val") for stage in each]

    def test_a_stage_of_ones_own(self, tmp_path):
        calls = []

        class Sleeper(Hook):
            def when_called(self, runner, **kwargs):
                calls.append(kwargs)

        runner = Runner.from_cfg(config(tmp_path, custom_hooks=[Sleeper()]))
        runner.call_hook("when_called", who="me")
        assert calls == [dict(who="me")]


def test_every_so_often(tmp_path):
    hook = Hook()
    runner = Runner.from_cfg(config(tmp_path))
    seen = []
    for count in range(8):
        runner.train_loop.iter = runner.train_loop.epoch = count
        seen.append(
            (
                hook.every_n_epochs(runner, 3),
                hook.every_n_train_iters(runner, 3, start=2),
                hook.every_n_inner_iters(count, 4),
                hook.is_last_train_epoch(runner),
            )
        )
    columns = [[count for count, row in enumerate(seen) if row[column]] for column in range(4)]
    assert columns == [[2, 5], [1, 4, 7], [3, 7], [3]]
    assert not any(hook.every_n_inner_iters(count, n) for count in range(4) for n in (0, -1))
    runner.train_loop.iter = 19
    assert hook.is_last_train_iter(runner)


class TestLearningRates:
    def test_each_scheduler_steps_in_its_unit(self, tmp_path):
        schedule = [
            dict(type="ExponentialLR", gamma=0.5, by_epoch=True),
            dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=3),
        ]
        wrapper = dict(optimizer=dict(type="FusedSGD", lr=1.0))
        runner = train(config(tmp_path, param_scheduler=schedule, optim_wrapper=wrapper))
        warmup = [0.5, 0.75] + [1.0] * 18
        expected = [factor * 0.5 ** (index // 5) for index, factor in enumerate(warmup)]
        assert recorded(runner).lrs == pytest.approx(expected)

    def test_what_looks_at_metrics_gets_them(self, tmp_path):
        class Falling(Hook):
            priority = "HIGHEST"

            def after_val_epoch(self, runner, metrics=None):
                metrics["accuracy"] = 1 / runner.epoch

        schedule = dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0, factor=0.5)
        runner = train(config(tmp_path, param_scheduler=schedule), Falling())
        assert recorded(runner).lrs[::5] == [0.01, 0.01, 0.005, 0.0025]

    def test_without_schedulers_it_stays(self, tmp_path):
        runner = train(config(tmp_path, param_scheduler=None))
        assert set(recorded(runner).lrs) == {0.01} and runner.param_schedulers is None


def terminal(monkeypatch) -> io.StringIO:
    """Stands for the terminal from now on."""
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", written)
    return written


def rich_terminal(monkeypatch, columns: int = 160) -> io.StringIO:
    """One on which rich shows a progress bar."""
    pytest.importorskip("rich", reason="rich is not installed: pip install 'fusedopt[engine]'")
    monkeypatch.setattr("rich._console", None)  # it reads the environment when it is made
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    return terminal(monkeypatch)


class TestLogging:
    @pytest.mark.parametrize(
        ("settings", "iterations"),
        [
            (dict(interval=2), [2, 4, 7, 9]),
            (dict(interval=3, ignore_last=False), [3, 5, 8, 10]),
            (dict(interval=5), [5, 10]),
            (dict(interval=7), [5, 10]),
            (dict(interval=4, ignore_last=True), [4, 9]),
        ],
    )
    def test_when(self, tmp_path, settings, iterations):
        hooks = dict(logger=dict(type="LoggerHook", **settings))
        changes = dict(train_cfg=dict(by_epoch=True, max_epochs=2), default_hooks=hooks)
        train(config(tmp_path, validates=False, **changes))
        assert [line["step"] for line in scalars(tmp_path)] == iterations

    def test_what_is_logged_is_the_mean_over_the_window(self, tmp_path):
        runner = train(config(tmp_path, validates=False, log_processor=dict(window_size=3)))
        losses = recorded(runner).losses
        line = next(line for line in scalars(tmp_path) if line["step"] == 9)
        assert line["loss"] == pytest.approx(sum(losses[index] for index in (6, 7, 8)) / 3)
        assert line["lr"] == pytest.approx(recorded(runner).lrs[8])

    def test_the_norm_of_an_accumulated_step_counts_once(self, tmp_path):
        wrapper = dict(
            optimizer=dict(type="FusedSGD", lr=0.1), clip_grad=dict(max_norm=9.0), accumulative_counts=4
        )  # fmt: skip
        hooks = dict(logger=dict(type="LoggerHook", interval=1))
        runner = train(config(tmp_path, validates=False, optim_wrapper=wrapper, default_hooks=hooks))
        lines = scalars(tmp_path)
        assert ["grad_norm" in line for line in lines[:4]] == [False, False, False, True]
        assert len(runner.message_hub.get_scalar("train/grad_norm").data) == 5

    @pytest.mark.parametrize("optimizer", ["FusedSGD", "SGD"])
    @pytest.mark.parametrize("by_name", [False, True])
    def test_the_norm_of_a_skipped_step_does_not_count(self, optimizer, by_name, tmp_path):
        class Norms(Hook):
            def __init__(self):
                self.made = []

            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                wrapper = runner.optim_wrapper["head"] if by_name else runner.optim_wrapper
                self.made.append(None if wrapper.step_was_skipped else float(wrapper.grad_norm))

        skipped = (0, 4, 5, 6, 9)

        class Player(PointNet):
            calls = 0

            def train_step(self, data, optim_wrapper):
                return super().train_step(data, optim_wrapper["head"] if by_name else optim_wrapper)

            def forward(self, inputs, labels, mode="tensor"):
                self.calls += 1
                loss = super().forward(inputs, labels, mode)["loss"]
                return dict(loss=loss * float("inf") if self.calls - 1 in skipped else loss)

        wrapper = dict(
            type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(type=optimizer, lr=0.1),
            clip_grad=dict(max_norm=1.0),
        )  # fmt: skip
        if by_name:
            both = dict(modules=["backbone", "head"])
            wrapper = dict(constructor="MultiOptimWrapperConstructor", head={**wrapper, **both})
        changes = dict(model=dict(type=Player), optim_wrapper=wrapper, param_scheduler=None, validates=False)
        norms = Norms()
        hooks = dict(logger=dict(type="LoggerHook", interval=1), checkpoint=None)
        train(config(tmp_path, default_hooks=hooks, log_processor=dict(window_size=3), **changes), norms)
        assert [index for index, norm in enumerate(norms.made) if norm is None] == list(skipped)
        for line in scalars(tmp_path):
            window = [norm for norm in norms.made[max(line["step"] - 3, 0) : line["step"]] if norm is not None]
            expected = pytest.approx(sum(window) / len(window)) if window else None
            assert line.get("head.grad_norm" if by_name else "grad_norm") == expected

    def test_what_is_not_finite_is_null(self, tmp_path):
        class Lost(PointNet):
            def forward(self, inputs, labels, mode="tensor"):
                outputs = super().forward(inputs, labels, mode)
                return dict(loss=outputs["loss"] * float("nan")) if mode == "loss" else outputs

        train(config(tmp_path, model=dict(type=Lost), validates=False))
        assert all(line["loss"] is None and line["grad_norm"] is None and line["lr"] > 0 for line in scalars(tmp_path))

    def test_metrics_by_iteration(self, tmp_path):
        hooks = dict(logger=dict(type="LoggerHook", log_metric_by_epoch=False))
        train(config(tmp_path, default_hooks=hooks))
        assert [line["step"] for line in scalars(tmp_path) if "accuracy" in line] == [5, 10, 15, 20]

    def test_copies_go_to_another_folder(self, tmp_path):
        hooks = dict(logger=dict(type="LoggerHook", out_dir=str(tmp_path / "out")))
        runner = train(config(tmp_path / "work", default_hooks=hooks, log_level="INFO"))
        names = {path.name for path in (tmp_path / "out" / "work").iterdir()}
        assert names == {"scalars.json", f"{runner.timestamp}.log"}

    def test_a_terminal_shows_a_progress_bar(self, tmp_path, monkeypatch):
        shown_on = rich_terminal(monkeypatch)
        train(config(tmp_path, log_level="INFO"))
        shown = shown_on.getvalue()
        assert "train" in shown and "20/20" in shown and "loss: " in shown and "grad_norm: " in shown
        assert "Epoch(val) [4][3/3]  accuracy: " in shown and "Epoch(train)" not in shown
        assert shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown, "the cursor is shown again"
        (log,) = tmp_path.glob("*.log")
        assert log.read_text().count("Epoch(train)") == 8

    @pytest.mark.parametrize("columns", [60, 80, 100, 120])
    def test_a_narrow_terminal_wraps_what_is_logged_and_keeps_the_bar(self, columns, tmp_path, monkeypatch):
        class Brackets(PointNet):
            """Losses whose names would be markup."""

            def forward(self, inputs, labels, mode="tensor"):
                outputs = super().forward(inputs, labels, mode)
                return {"loss[/b]": outputs["loss"], "loss[red]": outputs["loss"]} if mode == "loss" else outputs

        shown_on = rich_terminal(monkeypatch, columns)
        hooks = dict(logger=dict(type="LoggerHook", interval=5))
        train(config(tmp_path, validates=False, model=dict(type=Brackets), default_hooks=hooks))
        lines = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown_on.getvalue()).splitlines()
        assert max(map(len, lines)) <= columns
        last = max(index for index, line in enumerate(lines) if re.match(f"train {'━' * 20} 20/20 eta: 0:00:00 ", line))
        status = " ".join(" ".join(lines[last:]).split())
        assert all(f"{name}: " in status for name in ("lr", "loss", "loss[/b]", "loss[red]", "grad_norm", "time"))

    def test_an_interrupted_training_leaves_a_clean_terminal(self, tmp_path, monkeypatch):
        class Interrupt(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                raise KeyboardInterrupt

        shown_on = rich_terminal(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path), Interrupt())
        assert shown_on.getvalue().rindex("\x1b[?25h") > shown_on.getvalue().rindex("\x1b[?25l")
        assert sys.stdout is shown_on

    def test_without_rich_a_terminal_gets_lines(self, tmp_path, monkeypatch):
        shown_on = terminal(monkeypatch)
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "rich", None)
        train(config(tmp_path, log_level="INFO"))
        assert shown_on.getvalue().count("Epoch(train)") == 8 and "\x1b" not in shown_on.getvalue()

    def test_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'fusedopt[engine]'")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
        train(config(tmp_path, visualizer=dict(type="Visualizer", vis_backends=backends)))
        events = EventAccumulator(str(tmp_path / "vis_data"))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")] == [2, 4, 7, 9, 12, 14, 17, 19]
        assert [event.step for event in events.Scalars("accuracy")] == [1, 2, 3, 4]
        lines = [line["loss"] for line in scalars(tmp_path) if "loss" in line]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(lines)


class TestMessageHub:
    def test_tensors_are_kept_until_they_are_read(self):
        hub = MessageHub(window_size=3)
        value = torch.tensor(1.0, requires_grad=True)
        for number in (10.0, value * 1, torch.tensor([2.0]), 3):
            hub.update_scalar("train/loss", number)
        buffer = hub.get_scalar("train/loss")
        assert buffer.current() == 3.0 and buffer.data == [1.0, 2.0, 3.0] and buffer.mean() == 2.0
        hub.update_scalar("train/loss", 4.0)
        assert buffer.data == [2.0, 3.0, 4.0]

    def test_what_is_left_out_keeps_its_place(self):
        hub, other = MessageHub(window_size=3), MessageHub(window_size=3)
        for number in (1.0, 2.0, 3.0):
            hub.update_scalar("train/grad_norm", torch.tensor(number), unless=torch.tensor(number == 2))
        other.load_state_dict(hub.state_dict())
        for each in (hub, other):
            assert each.get_scalar("train/grad_norm").data == [1.0, 3.0]
            each.update_scalar("train/grad_norm", 4.0)
            assert each.get_scalar("train/grad_norm").data == [3.0, 4.0]

    def test_state(self):
        hub, other = MessageHub(), MessageHub()
        hub.update_scalar("train/lr", torch.tensor(0.5))
        hub.update_info("iter", 3)
        other.load_state_dict(hub.state_dict())
        assert (
            other.state_dict() == hub.state_dict() == dict(log_scalars={"train/lr": [0.5]}, runtime_info=dict(iter=3))
        )
        assert other.pop_info("iter") == 3 and other.get_info("iter", 7) == 7

    def test_what_a_checkpoint_cannot_hold_stays_out_of_the_state(self):
        hub = MessageHub()
        hub.update_info("fine", [1, dict(a=torch.ones(2))])
        hub.update_info("hook", Hook())
        assert set(hub.state_dict()["runtime_info"]) == {"fine"} and isinstance(hub.get_info("hook"), Hook)

    def test_what_is_no_scalar(self):
        with pytest.raises(ValueError, match=r"'train/loss' is logged as a number: .*, got shape \(2,\)"):
            MessageHub().update_scalar("train/loss", torch.ones(2))
        with pytest.raises(ValueError, match="'train/loss' is logged as a number: could not convert string"):
            MessageHub().update_scalar("train/loss", "low")
        with pytest.raises(KeyError, match="no scalar 'loss' was logged"):
            MessageHub().get_scalar("loss")
        with pytest.raises(ValueError, match="Invalid window_size: 0"):
            MessageHub(0)


def test_the_cache_of_the_gpu_is_emptied(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    for settings, count in ((dict(), 4), (dict(before_epoch=True, after_epoch=False), 4), (dict(after_iter=True), 24)):
        calls.clear()
        train(config(tmp_path, validates=False), EmptyCacheHook(**settings))
        assert len(calls) == count


def test_alone_there_is_nothing_to_average(tmp_path):
    runner = train(config(tmp_path, model=dict(type="PointNet", batch_norm=True)), SyncBuffersHook())
    assert runner.epoch == 4


def test_the_sampler_of_a_batch_sampler_is_told_the_epoch(tmp_path):
    epochs = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    data = loader(8, 8, shuffle=True)
    data["batch_sampler"] = dict(type=torch.utils.data.BatchSampler, drop_last=False)
    data["sampler"] = Sampler(Points(8))
    train(config(tmp_path, validates=False, train_dataloader=data))
    assert epochs == [0, 1, 2, 3]
