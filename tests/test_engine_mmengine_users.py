"""Smaller parts of MMEngine's interface: data, intervals, published files, methods of hooks and of the Runner."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from engine_cases import PointNet, Points, by_iterations, config, loader, recorded, train

from fusedopt.training.engine import (
    BaseModel,
    CheckpointHook,
    EMAHook,
    EpochBasedTrainLoop,
    Evaluator,
    Hook,
    LoggerHook,
    ParamSchedulerHook,
    Runner,
    TestLoop,
    ValLoop,
)


class TestNumBatchPerEpoch:
    @pytest.mark.parametrize(
        "batches",
        [
            dict(batch_size=8),
            dict(batch_sampler=dict(type=torch.utils.data.BatchSampler, batch_size=8, drop_last=True)),
        ],
    )
    def test_only_so_many_batches_are_used(self, tmp_path, batches):
        data = {**loader(40, 8, shuffle=True), "num_batch_per_epoch": 2}
        del data["batch_size"]
        runner = train(config(tmp_path, train_dataloader={**data, **batches}))
        assert len(runner.train_dataloader) == 2 and runner.iter == 8
        part = runner.train_dataloader.dataset
        assert len(part) == 16 and part.metainfo == Points.metainfo
        assert len(pickle.loads(pickle.dumps(part))) == 16

    def test_also_in_a_validation(self, tmp_path):
        cfg = config(tmp_path)
        cfg["val_dataloader"]["num_batch_per_epoch"] = 1
        assert recorded(train(cfg)).metrics[-1]["count"] == 8

    def test_more_than_there_are(self, tmp_path):
        data = {**loader(40, 8, shuffle=True), "num_batch_per_epoch": 6}
        with pytest.raises(ValueError, match="num_batch_per_epoch=6 needs 48 samples; the data set has 40"):
            Runner.from_cfg(config(tmp_path, train_dataloader=data))


class Validations(Hook):
    def __init__(self):
        self.after = []

    def before_val(self, runner):
        self.after.append(runner.iter)


class TestDynamicIntervals:
    INTERVALS = (
        dict(val_interval=4, dynamic_intervals=[(7, 2), (10, 1)]),
        dict(val_interval=3, dynamic_intervals=[[1, 5]]),
        dict(val_interval=5, dynamic_intervals=[(11, 2)], val_begin=6),
        dict(val_interval=2, dynamic_intervals=None),
    )

    def expected(self, length, settings):
        """Which epochs or iterations MMEngine's loops validate after."""
        utils = pytest.importorskip("mmengine.runner.utils", reason="mmengine is not installed")
        pairs = settings["dynamic_intervals"]
        milestones, intervals = utils.calc_dynamic_intervals(
            settings["val_interval"], None if pairs is None else [tuple(pair) for pair in pairs]
        )
        found = []
        for done in range(1, length + 1):
            interval = intervals[sum(milestone <= done + 1 for milestone in milestones) - 1]
            if done >= settings.get("val_begin", 1) and (done % interval == 0 or done == length):
                found.append(done)
        return found

    @pytest.mark.parametrize("settings", INTERVALS)
    @pytest.mark.parametrize("by_epoch", [True, False])
    def test_as_in_mmengine(self, tmp_path, by_epoch, settings):
        hook = Validations()
        if by_epoch:
            changes = dict(train_cfg=dict(by_epoch=True, max_epochs=12, **settings), param_scheduler=None)
        else:
            changes = by_iterations(train_cfg=dict(by_epoch=False, max_iters=12, **settings), param_scheduler=None)
        runner = train(config(tmp_path, **changes), hook)
        per = 5 if by_epoch else 1
        assert [count // per for count in hook.after] == self.expected(12, settings)
        assert runner.val_interval == ((settings["dynamic_intervals"] or [(0, settings["val_interval"])])[-1][1])
        assert runner.val_begin == settings.get("val_begin", 1)

    def test_mistakes(self, tmp_path):
        for pairs, error in (([3], TypeError), ([(3, 0)], ValueError), ([(3, 1, 2)], TypeError)):
            with pytest.raises(error, match=r"train_cfg\.dynamic_intervals"):
                Runner.from_cfg(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=3, dynamic_intervals=pairs)))


class TestFiles:
    def published(self, folder):
        return sorted(
            path for path in folder.glob("*.pth") if len(path.stem.rpartition("-")[2]) == 8 and "-" in path.stem
        )

    def test_published_checkpoints(self, tmp_path):
        hook = dict(type="CheckpointHook", interval=2, save_best="accuracy", published_keys=["state_dict", "meta"])
        train(config(tmp_path, default_hooks=dict(checkpoint=hook)))
        files = self.published(tmp_path)
        assert len(files) == 2 and files[0].name.startswith("best_accuracy_") and files[1].name.startswith("epoch_4-")
        for path in files:
            assert set(torch.load(path, weights_only=True)) == {"state_dict", "meta"}
            assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2])
        Runner.from_cfg(config(tmp_path / "b", load_from=str(files[1]))).load_or_resume()

    def test_one_key_and_several_metrics(self, tmp_path):
        best = dict(save_best=["accuracy", "count"], rule="greater", published_keys="state_dict", save_last=False)
        train(config(tmp_path, default_hooks=dict(checkpoint=dict(type="CheckpointHook", **best))))
        assert [path.name.partition("_epoch")[0] for path in self.published(tmp_path)] == [
            "best_accuracy",
            "best_count",
        ]

    @pytest.mark.parametrize("hook", [CheckpointHook, LoggerHook])
    def test_files_are_local(self, hook):
        hook(backend_args=None)
        hook(backend_args=dict(backend="local"))
        with pytest.raises(ValueError, match=r"Invalid backend_args: \{'backend': 'petrel'\}; expected None or"):
            hook(backend_args=dict(backend="petrel"))

    def test_the_name_of_the_experiment(self, tmp_path):
        hooks = dict(logger=dict(type="LoggerHook", interval=5, interval_exp_name=10))
        runner = train(config(tmp_path, default_hooks=hooks, log_level="INFO"))
        (log,) = tmp_path.glob("*.log")
        assert log.read_text().count(f"Exp name: {runner.experiment_name}") == 2


class TestHooks:
    def test_the_end_of_an_epoch(self):
        assert Hook().end_of_epoch(range(3), 2) and not Hook().end_of_epoch(range(3), 1)

    def test_triggered_stages(self):
        class Mine(Hook):
            def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train"):
                pass

            def before_run(self, runner):
                pass

        assert Mine().get_triggered_stages() == ["before_run", "after_train_iter", "after_val_iter", "after_test_iter"]
        assert Hook().get_triggered_stages() == []
        assert ParamSchedulerHook().get_triggered_stages() == [
            "after_train_iter",
            "after_train_epoch",
            "after_val_epoch",
        ]
        assert "after_train_iter" in EMAHook().get_triggered_stages()


class TestBuilders:
    def test_a_subclass_may_override_them(self, tmp_path):
        calls = []

        class Mine(Runner):
            def build_model(self, model):
                calls.append("model")
                return super().build_model(dict(model, dropout=0.0))

            def wrap_model(self, model_wrapper_cfg, model):
                calls.append("wrap")
                return super().wrap_model(model_wrapper_cfg, model)

            def build_train_loop(self, loop):
                calls.append("train")
                return super().build_train_loop(dict(loop, max_epochs=1))

            def build_val_loop(self, loop):
                calls.append("val")
                return super().build_val_loop(loop)

            def build_optim_wrapper(self, optim_wrapper):
                calls.append("optim")
                return super().build_optim_wrapper(optim_wrapper)

            def build_param_scheduler(self, scheduler):
                calls.append("scheduler")
                return super().build_param_scheduler(None)

        runner = Mine.from_cfg(config(tmp_path))
        runner.train()
        assert calls == ["model", "wrap", "val", "train", "optim", "scheduler"]
        assert runner.epoch == 1 and runner.param_schedulers is None and runner.model.backbone[3].p == 0.0

    def test_they_build_from_configs(self, tmp_path):
        runner = Runner.from_cfg(config(tmp_path))
        assert type(runner.build_train_loop(dict(by_epoch=True, max_epochs=1))) is EpochBasedTrainLoop
        assert type(runner.build_val_loop(dict())) is ValLoop
        assert runner.build_optim_wrapper(dict(optimizer=dict(type="SGD", lr=0.1))).get_lr() == {"lr": [0.1]}
        assert len(runner.build_param_scheduler(dict(type="StepLR", step_size=1))) == 1
        assert len(runner.build_evaluator([dict(type="HitRate")]).metrics) == 1
        assert type(runner.build_model(dict(type="PointNet"))) is PointNet
        assert runner.distributed is False


def test_a_validation_loop_that_derives_from_nothing_of_ours(tmp_path):
    class Own:
        def __init__(self, runner, dataloader, evaluator, times):
            self.runner, self.dataloader, self.evaluator, self.times = runner, dataloader, evaluator, times

        def run(self):
            for _ in range(self.times):
                self.runner.call_hook("after_val_epoch", metrics=dict(accuracy=0.5))

    runner = train(config(tmp_path, val_cfg=dict(type=Own, times=2)))
    assert recorded(runner).metrics == [dict(accuracy=0.5)] * 8


def test_init_cfg_is_refused_with_a_sentence():
    class Net(BaseModel):
        def forward(self, inputs, mode="tensor"):
            return inputs

    Net(init_cfg=None)
    with pytest.raises(ValueError, match=r"Invalid init_cfg: .*Kaiming.*; expected None\. Initialize the weights in"):
        Net(init_cfg=dict(type="Kaiming", layer="Conv2d"))


def test_several_data_loaders_for_a_loop_of_ones_own(tmp_path):
    class Each(TestLoop):
        def __init__(self, runner, dataloader, evaluator):
            self.loops = [TestLoop(runner, *pair) for pair in zip(dataloader, evaluator, strict=True)]

        def run(self):
            return [loop.run() for loop in self.loops]

    cfg = config(tmp_path, test_dataloader=[loader(20, 8, shuffle=False), loader(10, 8, shuffle=False)])
    cfg["test_evaluator"] = [dict(type="Evaluator", metrics=[dict(type="HitRate")]), dict(type="HitRate")]
    runner = Runner.from_cfg({**cfg, "test_cfg": dict(type=Each)})
    assert all(isinstance(loop.evaluator, Evaluator) for loop in runner.test_loop.loops)
    with pytest.raises(TypeError, match="dataloader must be a dict, got list"):
        Runner.from_cfg({**cfg, "test_cfg": dict()})


def test_resume_none_is_false(tmp_path):
    assert train(config(tmp_path, resume=None)).epoch == 4
    with pytest.raises(TypeError, match="resume must be True or False, got 'auto'"):
        Runner.from_cfg(config(tmp_path, resume="auto"))
