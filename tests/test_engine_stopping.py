"""Metrics as arrays, EarlyStoppingHook, ProfilerHook, and the current message hub."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from engine_cases import PointNet, config, recorded, scalars, train

from fusedopt.training.engine import BaseMetric, EarlyStoppingHook, Hook, MessageHub, ProfilerHook, Runner
from fusedopt.training.registry import METRICS

ONES = {
    "0-dim array": np.array,
    "array": lambda value: np.array([value]),
    "numpy number": np.float32,
    "0-dim tensor": torch.tensor,
    "tensor": lambda value: torch.tensor([[value]]),
}


@METRICS.register_module(force=True)
class Scripted(BaseMetric):
    """Gives these values of ``score``, one for each validation."""

    def __init__(self, scores, wrap=float):
        super().__init__()
        self.scores, self.wrap = scores, wrap

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        epoch = MessageHub.get_current_instance().get_info("epoch")
        return dict(score=self.wrap(float(self.scores[epoch])), table=np.zeros((2, 2)), name="a")


def scripted(tmp_path, scores, hooks=(), wrap=float, **changes):
    metric = dict(type="Scripted", scores=scores, wrap=wrap)
    length = dict(by_epoch=True, max_epochs=len(scores))
    defaults = dict(param_scheduler=None, train_cfg=length, val_evaluator=metric, custom_hooks=list(hooks))
    return config(tmp_path, **{**defaults, **changes})


class TestMetricsOfOneElement:
    @pytest.mark.parametrize("wrap", ONES.values(), ids=ONES)
    def test_they_are_numbers_everywhere(self, tmp_path, wrap):
        runner = train(
            scripted(
                tmp_path,
                [0.5, 0.25, 0.75, 0.5],
                [dict(type="EarlyStoppingHook", monitor="score", rule="greater", patience=9, stopping_threshold=0.7)],
                wrap,
                param_scheduler=dict(type="ReduceOnPlateauLR", monitor="score", rule="greater", patience=0, factor=0.5),
                default_hooks=dict(checkpoint=dict(type="CheckpointHook", save_best="score", rule="greater")),
            )
        )
        logged = [line for line in scalars(tmp_path) if "score" in line]
        assert [line["score"] for line in logged] == [0.5, 0.25, 0.75]
        assert not {"table", "name"} & set(logged[0])
        assert (tmp_path / "best_score_epoch_3.pth").exists()
        assert runner.epoch == 3, "stopped by the threshold"
        assert runner.optim_wrapper.get_lr()["lr"] == [0.005]

    def test_two_elements_are_none(self, tmp_path):
        best = dict(checkpoint=dict(type="CheckpointHook", save_best="score", rule="less"))
        cfg = scripted(tmp_path, [1.0], wrap=lambda value: np.array([value, value]), default_hooks=best)
        with pytest.raises(TypeError, match="save_best='score' is a ndarray, not a number"):
            train(cfg)


class TestEarlyStopping:
    @pytest.mark.parametrize(
        ("settings", "scores", "epochs"),
        [
            (dict(rule="greater", patience=2), [1, 2, 2.05, 1, 5], 4),
            (dict(rule="greater", patience=2, min_delta=0.01), [1, 2, 2.05, 1, 5], 5),
            (dict(rule="less", patience=1), [3, 2, 1, 1, 0], 4),
            (dict(rule="less", patience=1), [3, 2, 1, 0.5, 0], 5),
            (dict(rule="less"), [3, float("nan"), 1], 2),
            (dict(rule="less", check_finite=False), [3, float("inf"), 1], 3),
            (dict(rule="less", stopping_threshold=1.5), [3, 2, 1, 0], 3),
        ],
    )
    def test_when_a_run_ends(self, tmp_path, settings, scores, epochs):
        runner = train(scripted(tmp_path, scores, [dict(type="EarlyStoppingHook", monitor="score", **settings)]))
        assert runner.epoch == epochs

    @pytest.mark.parametrize("seed", range(20))
    def test_as_mmengines(self, tmp_path, seed):
        hooks = pytest.importorskip("mmengine.hooks", reason="mmengine is not installed")
        random = np.random.default_rng(seed)
        scores = random.integers(-3, 4, size=12) / 4
        settings = dict(
            monitor="score",
            rule=str(random.choice(["greater", "less"])),
            patience=int(random.integers(1, 5)),
            min_delta=float(random.choice([0.0, 0.1, 0.3])),
            stopping_threshold=None if seed % 2 else float(random.choice([-0.5, 0.5])),
        )
        ours, theirs = EarlyStoppingHook(**settings), hooks.EarlyStoppingHook(**settings)
        runner = Runner.from_cfg(config(tmp_path))
        runner.register_hook(ours)
        ours.before_train(runner)
        stopped = []
        for score in scores:
            theirs_stops, _ = theirs._check_stop_condition(score)
            ours.after_val_epoch(runner, dict(score=score))
            stopped.append((runner.train_loop.stop_training, theirs_stops))
            if theirs_stops:
                break
        assert all(ours == theirs for ours, theirs in stopped)

    def test_two_of_them_count_apart(self, tmp_path):
        runner = Runner.from_cfg(config(tmp_path))
        hooks = [EarlyStoppingHook(name, rule="greater", patience=3) for name in ("score", "score", "other")]
        for hook in hooks:
            runner.register_hook(hook)
            hook.before_train(runner)
        for other in (0.0, 1.0, 2.0):
            for hook in hooks:
                hook.after_val_epoch(runner, dict(score=5.0, other=other))
            assert not runner.train_loop.stop_training
        hooks[1].after_val_epoch(runner, dict(score=5.0, other=3.0))
        assert runner.train_loop.stop_training

    def test_a_validation_before_training_does_not_count(self, tmp_path):
        runner = Runner.from_cfg(config(tmp_path))
        EarlyStoppingHook("score", rule="less").after_val_epoch(runner, dict(score=float("nan")))
        assert not runner.train_loop.stop_training

    def test_a_resumed_run_goes_on_counting(self, tmp_path):
        hook = dict(type="EarlyStoppingHook", monitor="score", rule="less", patience=3)
        cfg = scripted(tmp_path, [1.0] * 8, [hook])
        train({**cfg, "train_cfg": dict(by_epoch=True, max_epochs=2)})
        assert train({**cfg, "resume": True}).epoch == 4

    def test_the_rule_comes_from_the_name(self):
        assert EarlyStoppingHook(monitor="val/accuracy").rule == "greater"
        assert EarlyStoppingHook(monitor="loss").rule == "less"
        with pytest.raises(ValueError, match="monitor='score': its name does not say"):
            EarlyStoppingHook(monitor="score")
        with pytest.raises(ValueError, match="Invalid rule: 'more'"):
            EarlyStoppingHook(monitor="loss", rule="more")

    def test_a_metric_that_is_not_there(self, tmp_path):
        hook = dict(type="EarlyStoppingHook", monitor="scor", rule="less")
        assert train(scripted(tmp_path, [1, 1], [hook])).epoch == 2
        (log,) = tmp_path.glob("*.log")
        assert log.read_text().count("monitor='scor' is not among the metrics; did you mean 'score'?") == 1
        with pytest.raises(KeyError, match="monitor='scor' is not among the metrics"):
            train(scripted(tmp_path, [1, 1], [dict(hook, strict=True)]))


class TestProfiler:
    def test_it_writes_a_trace(self, tmp_path, capsys):
        tables = []
        hook = dict(
            type="ProfilerHook",
            by_epoch=False,
            profile_times=2,
            on_trace_ready=dict(type="log_trace", sort_by="self_cpu_time_total", row_limit=3),
            json_trace_path=tmp_path / "trace.json",
        )
        train(config(tmp_path, custom_hooks=[hook], validates=False))
        assert "Self CPU" in capsys.readouterr().out
        names = [event.get("name", "") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
        assert names.count("Optimizer.step#FusedAdamW.step") == 2
        own = ProfilerHook(on_trace_ready=tables.append, schedule=dict(wait=1, warmup=1, active=1, repeat=1))
        train(config(tmp_path / "epoch", custom_hooks=[own], validates=False))
        assert len(tables) == 1

    def test_for_tensorboard(self, tmp_path):
        hook = dict(type="ProfilerHook", on_trace_ready=dict(type="tb_trace"))
        train(config(tmp_path, custom_hooks=[hook], validates=False))
        assert list((tmp_path / "tf_tracing_logs").glob("*.json"))

    def test_a_run_that_fails_leaves_no_profiler(self, tmp_path):
        class Fails(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
                raise OSError("no space left")

        for _ in range(2):  # torch refuses to start a second profiler while one runs
            with pytest.raises(OSError, match="no space"):
                train(config(tmp_path, custom_hooks=[dict(type="ProfilerHook")]), Fails())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (dict(profile_times=2), "Invalid profile_times: 2; expected 1 with by_epoch=True"),
            (
                dict(on_trace_ready=dict(type="log")),
                "Invalid on_trace_ready type: 'log'; expected one of log_trace, tb_trace",
            ),
            (dict(on_trace_ready="log_trace"), "on_trace_ready must be a function, a dict with a type, or None"),
        ],
    )
    def test_mistakes(self, settings, message):
        with pytest.raises((TypeError, ValueError), match=message):
            ProfilerHook(**settings)


class TestCurrentHub:
    def test_a_model_reads_the_epoch_of_its_runner(self, tmp_path):
        seen = []

        class Reads(PointNet):
            def __init__(self):
                super().__init__()
                self.hub = MessageHub.get_current_instance()

            def forward(self, inputs, labels, mode="tensor"):
                assert self.hub is MessageHub.get_current_instance()
                if mode == "loss":
                    seen.append((self.hub.get_info("epoch"), self.hub.get_info("max_epochs")))
                return super().forward(inputs, labels, mode)

        runners = [Runner.from_cfg(config(tmp_path / name, model=dict(type=Reads))) for name in "ab"]
        for runner in runners:
            runner.train()
            assert runner.model.hub is runner.message_hub
        assert sorted(set(seen)) == [(epoch, 4) for epoch in range(4)]

    def test_there_is_one_without_a_runner(self, tmp_path):
        hub = MessageHub.get_current_instance()
        assert hub is MessageHub.get_current_instance()
        with pytest.raises(KeyError):
            Runner.from_cfg(config(tmp_path, model=dict(type="Nothing")))
        assert hub is MessageHub.get_current_instance()
        assert recorded(train(config(tmp_path))) and hub is MessageHub.get_current_instance()
