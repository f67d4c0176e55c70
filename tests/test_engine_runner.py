"""The Runner: loops by epoch and by iteration, what they log and save, and what is wrong with a config."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import PointNet, Points, by_iterations, config, loader, recorded, scalars, train
from torch.utils.data import BatchSampler, DataLoader

from fusedopt import FusedAdamW, OptimWrapper
from fusedopt.training.engine import (
    BaseDataPreprocessor,
    CheckpointError,
    Config,
    ConfigError,
    EpochBasedTrainLoop,
    Hook,
    Runner,
)
from fusedopt.training.engine.parts import set_environment


def test_training_by_epochs_trains_validates_logs_and_saves(tmp_path):
    runner = train(config(tmp_path))
    record = recorded(runner)
    assert (runner.epoch, runner.iter, runner.max_epochs, runner.max_iters) == (4, 20, 4, 20)
    assert sum(list(record.losses.values())[-5:]) < sum(list(record.losses.values())[:5])
    assert len(record.metrics) == 4 and record.metrics[-1]["count"] == 20
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [f"epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_4.pth")
    lines = scalars(tmp_path)
    trained = [line for line in lines if "loss" in line]
    assert [(line["epoch"], line["iter"]) for line in trained] == [
        (epoch, 5 * (epoch - 1) + inner) for epoch in (1, 2, 3, 4) for inner in (2, 4)
    ]
    assert {"lr", "loss", "grad_norm", "time", "data_time"} <= set(trained[0])
    assert [line["step"] for line in lines if "accuracy" in line] == [1, 2, 3, 4]


def test_training_by_iterations(tmp_path):
    runner = train(config(tmp_path, **by_iterations()))
    record = recorded(runner)
    assert (runner.epoch, runner.iter, runner.max_epochs, runner.max_iters) == (0, 20, 1, 20)
    assert len(record.metrics) == 4
    assert {path.name for path in tmp_path.glob("*.pth")} == {f"iter_{done}.pth" for done in (5, 10, 15, 20)}
    assert [line["step"] for line in scalars(tmp_path) if "accuracy" in line] == [5, 10, 15, 20]


@pytest.mark.parametrize("changes", [{}, dict(batch_sampler=dict(type=BatchSampler, drop_last=False))])
def test_data_start_anew_in_another_order_when_they_end(changes, tmp_path):
    seen: list[torch.Tensor] = []

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(data_batch["labels"])
            assert batch_idx == runner.iter

    data = {**loader(40, 8, shuffle=True), **changes}
    finite = by_iterations(train_dataloader=data, train_cfg=dict(by_epoch=False, max_iters=12))
    train(config(tmp_path, validates=False, **finite), Watch())
    first, second, rest = torch.cat(seen[:5]), torch.cat(seen[5:10]), seen[10:]
    assert len(rest) == 2
    assert not torch.equal(first, second) and torch.equal(first.sort()[0], second.sort()[0])


@pytest.mark.parametrize(
    ("train_cfg", "validated_after"),
    [
        (dict(by_epoch=True, max_epochs=5), [5, 10, 15, 20, 25]),
        (dict(by_epoch=True, max_epochs=5, val_interval=2), [10, 20, 25]),
        (dict(by_epoch=True, max_epochs=5, val_begin=3), [15, 20, 25]),
        (dict(type="EpochBasedTrainLoop", max_epochs=5, val_begin=4, val_interval=3), [25]),
        (dict(by_epoch=False, max_iters=10, val_interval=4), [4, 8, 10]),
        (dict(type="IterBasedTrainLoop", max_iters=10, val_interval=4, val_begin=5), [8, 10]),
        (dict(by_epoch=False, max_iters=10), [10]),
    ],
)
def test_when_it_validates(tmp_path, train_cfg, validated_after):
    places = []

    class Watch(Hook):
        def before_val(self, runner):
            places.append(runner.iter)

    hooks = dict(checkpoint=None)
    train(config(tmp_path, train_cfg=train_cfg, param_scheduler=None, default_hooks=hooks), Watch())
    assert places == validated_after


def test_one_seed_gives_one_training_whether_it_validates_or_not(tmp_path):
    first, again = (recorded(train(config(tmp_path / str(number)))) for number in range(2))
    unvalidated = recorded(train(config(tmp_path / "unvalidated", validates=False)))
    other = recorded(train(config(tmp_path / "other", randomness=dict(seed=1))))
    assert first.losses == again.losses == unvalidated.losses != other.losses
    assert first.metrics == again.metrics


def test_a_validation_may_share_the_generator_of_the_training_data(tmp_path):
    def losses(validates):
        generator = torch.Generator().manual_seed(3)
        data = DataLoader(Points(40), batch_size=8, shuffle=True, generator=generator)
        changes = dict(val_dataloader=DataLoader(Points(20), batch_size=8, generator=generator)) if validates else {}
        return recorded(train(config(tmp_path, validates=validates, train_dataloader=data, **changes))).losses

    assert losses(validates=True) == losses(validates=False)


def test_without_a_seed_each_training_has_its_own(tmp_path):
    seeds = {Runner.from_cfg(config(tmp_path, randomness={})).seed for _ in range(3)}
    assert len(seeds) == 3


class TestDeterministicOnAGpu:
    """cuBLAS reads its workspace's size when it starts, and torch multiplies only with a fixed one."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what is there now is put back
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        self.used = self.asked = False
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.used)

        def current_device():
            self.used = True  # by the Runner
            return 0

        monkeypatch.setattr(torch.cuda, "current_device", current_device)
        monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **_: setattr(self, "asked", mode))

    def start(self, **env_cfg):
        """A Runner up to its randomness; what comes after needs a real GPU."""
        runner = Runner.__new__(Runner)
        runner._cuda_was_in_use = torch.cuda.is_initialized()
        runner.device, _ = set_environment(env_cfg)
        runner.set_randomness(seed=0, deterministic=True)

    def test_the_runner_sets_it(self):
        self.start()
        assert self.asked
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    @pytest.mark.parametrize("value", [":4096:8", ":16:8"])
    def test_a_fixed_one_is_kept_however_late(self, value, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
        self.used = True
        self.start()
        assert self.asked
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == value

    def test_another_is_an_error(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 \(or :16:8\) .*, which has ':0:0'"):
            self.start()
        assert not self.asked

    def test_where_cuda_was_used_before_it_is_too_late(self):
        self.used = True
        with pytest.raises(ValueError, match=r"deterministic=True .* already used CUDA: set it before"):
            self.start()
        assert not self.asked
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

    def test_on_a_cpu_it_does_not_matter(self):
        self.used = True
        self.start(device="cpu")
        assert self.asked
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

    def test_on_amds_gpus_it_does_not_matter(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "7.0")
        self.used = True
        self.start()
        assert self.asked
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ

    def test_cuda_is_asked_before_the_runner_uses_it(self, tmp_path):
        class Stop(Exception):
            pass

        class Stopped(Runner):
            def set_randomness(self, **settings):
                raise Stop(self._cuda_was_in_use)

        with pytest.raises(Stop, match="False"):
            Stopped.from_cfg(config(tmp_path))
        assert self.used


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_draw_random_numbers_that_depend_on_the_batch_alone(tmp_path, workers):
    """One worker or two, a new process for each epoch or not: the augmentation is the same, and new each epoch."""
    batches: dict[Any, list[torch.Tensor]] = {}

    class Watch(Hook):
        def __init__(self, key):
            self.seen = batches.setdefault(key, [])

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.seen.append(data_batch["inputs"])

    variants = [(1, False), (2, False), (2, True)] if workers else [(0, False)]
    for count, persistent in variants:
        data = loader(40, 8, shuffle=False)
        data.update(num_workers=count, persistent_workers=persistent)
        changes = dict(train_dataloader=data, train_cfg=dict(by_epoch=True, max_epochs=2), param_scheduler=None)
        train(config(tmp_path / f"{count}{persistent}", validates=False, **changes), Watch((count, persistent)))
    first, *others = batches.values()
    for other in others:
        assert all(map(torch.equal, first, other))
    assert not any(map(torch.equal, first[:5], first[5:]))
    assert len({float(batch.sum()) for batch in first}) == 10


def scale_noise(worker: int, factor: float) -> None:
    torch.utils.data.get_worker_info().dataset.noise *= factor


@pytest.mark.parametrize("cfg", [dict(type=scale_noise, factor=0.0), functools.partial(scale_noise, factor=0.0)])
def test_a_worker_is_made_ready(tmp_path, cfg):
    data = {**loader(16, 8, shuffle=False), "num_workers": 1, "worker_init_fn": cfg}
    changes = dict(train_dataloader=data, train_cfg=dict(by_epoch=True, max_epochs=2))
    batches: list[torch.Tensor] = []

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            batches.append(data_batch["inputs"])

    train(config(tmp_path, validates=False, **changes), Watch())
    assert torch.equal(batches[0], batches[2]), "without noise every epoch is the same"


@pytest.mark.parametrize("fp16", [False, True])
def test_a_validation_in_half_precision(tmp_path, fp16):
    dtypes = set()

    class Net(PointNet):
        def forward(self, inputs, labels, mode="tensor"):
            dtypes.add((mode, self.head(self.backbone(inputs)).dtype))
            return super().forward(inputs, labels, mode)

    train(config(tmp_path, model=dict(type=Net), val_cfg=dict(fp16=fp16)))
    assert dtypes == {("loss", torch.float32), ("predict", torch.bfloat16 if fp16 else torch.float32)}


def test_objects_in_place_of_configs(tmp_path):
    torch.manual_seed(0)
    model = PointNet()
    wrapper = OptimWrapper(FusedAdamW(model.parameters(), lr=1e-2))
    data = DataLoader(Points(20), batch_size=5, shuffle=True)
    runner = Runner(
        model,
        str(tmp_path),
        train_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=wrapper,
        log_level="WARNING",
    )
    assert runner.train() is model
    assert runner.train_dataloader is data and runner.optim_wrapper is wrapper and runner.iter == 8


def test_several_optimizers_are_logged_by_name_and_scheduled(tmp_path):
    class TwoPlayers(PointNet):
        def train_step(self, data, optim_wrapper):
            losses = {}
            for name in ("backbone", "head"):
                wrapper = optim_wrapper[name]
                with wrapper.optim_context(self):
                    loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
                wrapper.update_params(loss)
                losses[f"loss_{name}"] = loss.detach()
            return {"loss": sum(losses.values()), **losses}

    optim_wrapper = dict(
        constructor="MultiOptimWrapperConstructor",
        backbone=dict(optimizer=dict(type="FusedSGD", lr=0.1), clip_grad=dict(max_norm=1.0), accumulative_counts=2),
        head=dict(optimizer=dict(type="FusedAdamW", lr=1e-2)),
    )
    schedule = dict(backbone=dict(type="ExponentialLR", gamma=0.5), head=[])
    runner = train(config(tmp_path, model=TwoPlayers(), optim_wrapper=optim_wrapper, param_scheduler=schedule))
    lines = [line for line in scalars(tmp_path) if "loss" in line]
    assert lines[-1]["backbone.lr"] == 0.1 * 0.5**3 and lines[-1]["head.lr"] == 1e-2
    assert lines[-1]["backbone.grad_norm"] > 0 and "head.grad_norm" not in lines[-1]
    assert runner.optim_wrapper["head"].inner_count == 20


def test_a_training_in_mixed_precision_with_accumulation(tmp_path):
    optim_wrapper = dict(
        type="AmpOptimWrapper",
        dtype="bfloat16",
        loss_scale=dict(init_scale=128.0),
        accumulative_counts=2,
        optimizer=dict(type="FusedSGD", lr=0.1),
        clip_grad=dict(max_norm=1.0),
    )
    runner = train(config(tmp_path, optim_wrapper=optim_wrapper))
    assert runner.optim_wrapper.step_count == 10
    assert len(recorded(runner).losses) == 20


@pytest.mark.parametrize("mixed_precision", [{}, dict(type="AmpOptimWrapper", dtype="bfloat16")])
def test_the_gradient_norm_and_the_losses_are_read_when_they_are_logged_only(mixed_precision, tmp_path, monkeypatch):
    """On a GPU, every read is a wait for the device."""
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        original = getattr(torch.Tensor, name)

        def counting(tensor, *args, original=original, name=name, **kwargs):
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                reads.append((name, runner.iter))
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    changes = dict(
        default_hooks=dict(logger=dict(type="LoggerHook", interval=5), checkpoint=None),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        param_scheduler=dict(type="LinearLR", by_epoch=False, end=5),
        optim_wrapper=dict(optimizer=dict(type="FusedAdamW"), clip_grad=dict(max_norm=1.0), **mixed_precision),
    )
    runner = Runner.from_cfg(config(tmp_path, validates=False, **changes))
    assert reads == [], "building a Runner reads no tensor"
    runner.train()
    assert {iteration for _, iteration in reads} == {4}


def test_the_log_has_lines_for_people(tmp_path, capsys):
    train(config(tmp_path, log_level="INFO"))
    lines = capsys.readouterr().out.splitlines()
    trained = [line for line in lines if "Epoch(train)" in line]
    pattern = r"Epoch\(train\) \[2\]\[4/5\]  eta: 0:00:\d\d  lr: \d\.\d{4}e-0\d .*loss: \d.*grad_norm: \d"
    assert re.search(pattern, trained[3]), trained[3]
    assert any(re.search(r"Epoch\(val\) \[2\]\[3/3\]  accuracy: [01](\.\d+)?  count: 20", line) for line in lines)
    (file,) = tmp_path.glob("*.log")
    assert [line.partition(" INFO ")[2] for line in file.read_text().splitlines()] == [
        line.partition(" INFO ")[2] for line in lines
    ]


def test_the_log_counts_iterations_where_training_does(tmp_path, capsys):
    train(config(tmp_path, **by_iterations(), log_level="INFO", log_processor=dict(window_size=3)))
    output = capsys.readouterr().out
    assert "Iter(train) [10/20]  eta:" in output and "Iter(val) [3/3]  accuracy:" in output


def test_validation_and_test_alone(tmp_path):
    cfg = config(tmp_path / "train")
    trained = train(cfg)
    evaluation = {key: cfg[key] for key in ("model", "val_dataloader", "val_cfg", "val_evaluator")}
    evaluation |= dict(test_dataloader=cfg["val_dataloader"], test_cfg={}, test_evaluator=cfg["val_evaluator"])
    runner = Runner.from_cfg(
        dict(
            evaluation,
            work_dir=str(tmp_path / "val"),
            load_from=str(tmp_path / "train" / "epoch_4.pth"),
            log_level="WARNING",
            randomness=dict(seed=0),
        )
    )
    metrics = runner.val()
    assert metrics["count"] == 20 and metrics == runner.test()
    assert all(map(torch.equal, runner.model.parameters(), trained.model.parameters()))
    with pytest.raises(RuntimeError, match="nothing to train with"):
        runner.train()
    with pytest.raises(RuntimeError, match="there is no test: test_dataloader"):
        trained.test()


def test_a_failure_closes_what_is_open_and_leaves_a_later_run_possible(tmp_path):
    closed = []

    class Fragile(Hook):
        fails = True

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if self.fails and runner.iter == 3:
                raise KeyboardInterrupt

        def after_run(self, runner):
            closed.append("after_run")

        def close(self):
            closed.append("close")

    hook = Fragile()
    runner = Runner.from_cfg(config(tmp_path, custom_hooks=[hook]))
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert closed == ["close"] and runner.iter == 3
    hook.fails = False
    again = Runner.from_cfg(config(tmp_path, custom_hooks=[hook]))
    again.train()
    assert closed == ["close", "after_run", "close"]


def test_an_interrupted_validation_does_not_count_in_the_next_one(tmp_path):
    class Fragile(Hook):
        fails = True

        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if self.fails and batch_idx == 1:
                raise KeyboardInterrupt

    hook = Fragile()
    runner = Runner.from_cfg(config(tmp_path, custom_hooks=[hook]))
    with pytest.raises(KeyboardInterrupt):
        runner.val()
    hook.fails = False
    assert runner.val()["count"] == 20


def test_a_hook_ends_the_training(tmp_path):
    class Stop(Hook):
        def after_train_epoch(self, runner):
            runner.train_loop.stop_training = runner.epoch == 1

    assert train(config(tmp_path), Stop()).epoch == 2


def test_the_data_preprocessor(tmp_path):
    class Shift(BaseDataPreprocessor):
        def forward(self, data, training=False):
            data = super().forward(data, training)
            return {**data, "inputs": data["inputs"] + (100 if training else 0)}

    seen = []

    class Net(PointNet):
        def forward(self, inputs, labels, mode="tensor"):
            seen.append((mode, bool(inputs.mean() > 50)))
            return super().forward(inputs, labels, mode)

    train(config(tmp_path, model=Net(data_preprocessor=Shift())))
    assert set(seen) == {("loss", True), ("predict", False)}


@pytest.mark.parametrize(
    ("losses", "total", "logged"),
    [
        (dict(loss=torch.tensor(2.0)), 2.0, dict(loss=2.0)),
        (dict(loss_a=torch.tensor([1.0, 3.0]), hits=torch.tensor(7.0)), 2.0, dict(loss=2.0, loss_a=2.0, hits=7.0)),
        (
            dict(loss_a=[torch.tensor(1.0), torch.tensor(2.0)], loss_b=torch.tensor(4.0)),
            7.0,
            dict(loss=7.0, loss_a=3.0, loss_b=4.0),
        ),
        (dict(loss_aux=torch.tensor(2.0), loss=torch.tensor(1.0)), 3.0, dict(loss=1.0, loss_aux=2.0)),
    ],
)
def test_losses_are_added_up(losses, total, logged):
    loss, log_vars = PointNet().parse_losses(losses)
    assert float(loss) == total and {name: float(value) for name, value in log_vars.items()} == logged


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (dict(loss=1.0), TypeError, "loss 'loss' must be a tensor or a list of tensors, got 1.0"),
        (dict(hits=torch.tensor(1.0)), ValueError, "expected a name that contains 'loss', got 'hits'"),
        (torch.tensor(1.0), TypeError, "must return a dict of losses, got Tensor"),
    ],
)
def test_losses_that_are_none(losses, error, message):
    with pytest.raises(error, match=re.escape(message)):
        PointNet().parse_losses(losses)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(train_cfg=dict(max_epochs=2)), ValueError, "train_cfg needs by_epoch=True or False, or a type"),
        (dict(train_cfg=dict(by_epoch=True, max_epochs=0)), ValueError, "Invalid train_cfg.max_epochs: 0"),
        (dict(train_cfg=dict(by_epoch=True, max_epoch=3)), TypeError, "did you mean 'max_epochs'?"),
        (
            dict(train_cfg=dict(by_epoch=True, max_epochs=3, type="IterBasedTrainLoop")),
            ValueError,
            "both type and by_epoch",
        ),
        (dict(train_cfg=dict(type="EpochBasedLoop", max_epochs=3)), KeyError, "did you mean 'EpochBasedTrainLoop'?"),
        (dict(train_cfg=(dict(by_epoch=True),)), TypeError, "a trailing comma"),
        (
            dict(train_dataloader=dict(batch_size=2)),
            KeyError,
            "dataloader needs the key 'dataset'; it has 'batch_size'",
        ),
        (
            dict(train_dataloader=loader(40, 8, True, "InfiniteSampler")),
            ValueError,
            "an epoch of an InfiniteSampler never ends",
        ),
        (
            dict(
                train_dataloader={
                    **loader(40, 8, True, "InfiniteSampler"),
                    "batch_sampler": dict(type=BatchSampler, drop_last=False),
                }
            ),
            ValueError,
            "an epoch of an InfiniteSampler never ends",
        ),
        (dict(train_dataloader=loader(40, 8, True, "DefaultSamples")), KeyError, "did you mean 'DefaultSampler'?"),
        (dict(train_dataloader=loader(40, 8, True, batchsize=3)), TypeError, "dataloader: "),
        (dict(train_dataloader=loader(0, 8, True)), ValueError, "the data set Points is empty"),
        (dict(train_dataloader=loader(4, 8, True, drop_last=True)), ValueError, "train_dataloader has no batch"),
        (
            dict(train_dataloader={**loader(4, 8, True), "collate_fn": dict(type="default_colate")}),
            KeyError,
            "did you mean 'default_collate'?",
        ),
        (dict(train_dataloader=None), ValueError, "belong together, but train_dataloader is missing"),
        (dict(val_cfg=dict(fp_16=True)), TypeError, "did you mean 'fp16'?"),
        (dict(val_evaluator=None), ValueError, "belong together, but val_evaluator is missing"),
        (dict(val_evaluator=dict(type="HitRates")), KeyError, "did you mean 'HitRate'?"),
        (dict(model=dict(type="PointNets")), KeyError, "did you mean 'PointNet'?"),
        (dict(model=torch.nn.Linear(2, 2)), TypeError, "Linear has no train_step; derive it from BaseModel"),
        (dict(model="PointNet"), TypeError, "model must be a dict, got str"),
        (dict(param_scheduler=dict(type="CosineLR")), KeyError, "did you mean"),
        (dict(env_cfg=dict(cudnn_bench=True)), ValueError, "did you mean 'cudnn_benchmark'?"),
        (dict(env_cfg=3), TypeError, "env_cfg must be a dict, got int"),
        (dict(env_cfg=dict(dist_cfg=3)), TypeError, "env_cfg.dist_cfg must be a dict, got int"),
        (dict(env_cfg=dict(mp_cfg=3)), TypeError, "env_cfg.mp_cfg must be a dict, got int"),
        (dict(auto_scale_lr=3), TypeError, "auto_scale_lr must be a dict, got int"),
        (dict(randomness=3), TypeError, "randomness must be a dict, got int"),
        (dict(log_processor=3), TypeError, "log_processor must be a dict, got int"),
        (dict(visualizer=3), TypeError, "visualizer must be a dict, got int"),
        (dict(visualizer=dict(vis_backends="x")), TypeError, "vis_backends must be a list of backends"),
        (dict(val_evaluator=3), TypeError, "val_evaluator must be a dict, got int"),
        (dict(val_evaluator=[dict(type="HitRate"), "x"]), TypeError, "val_evaluator must be a dict, got str"),
        (dict(experiment_name=3), TypeError, "experiment_name must be a string or None, got 3"),
        (dict(load_from=3), TypeError, "load_from must be a path or None, got 3"),
        (dict(train_dataloader={**loader(40, 8, True), "sampler": 3}), TypeError, "sampler must be a dict, got int"),
        (dict(val_dataloader=dict(dataset="Points")), TypeError, "dataset must be a dict, got str"),
        (dict(resume="maybe"), TypeError, "resume must be True or False, got 'maybe'"),
        (dict(log_level="LOUD"), ValueError, "Invalid log_level: 'LOUD'"),
        (dict(env_cfg=dict(device="gpu")), ValueError, "Invalid env_cfg.device: 'gpu'; Expected one of cpu, cuda"),
        (dict(log_processor=dict(window=3)), ValueError, "did you mean 'window_size'?"),
        (dict(randomness=dict(seed=-1)), ValueError, "Invalid randomness.seed: -1"),
        (dict(randomness=dict(sead=1)), ValueError, "randomness has the unknown key 'sead'; did you mean 'seed'?"),
        (dict(launcher="slurm"), ValueError, "Invalid launcher: 'slurm'"),
        (dict(launcher="pytorch"), RuntimeError, "start the training with torchrun"),
        (
            dict(visualizer=dict(vis_backends=[dict(type="LocalVisBackends")])),
            KeyError,
            "did you mean 'LocalVisBackend'?",
        ),
    ],
)
def test_a_wrong_config_fails_before_anything_runs(tmp_path, monkeypatch, changes, error, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(message)):
        Runner.from_cfg(config(tmp_path / "work", **changes))
    assert list(tmp_path.iterdir()) == []


def test_what_mmengine_configs_have_besides_is_accepted(tmp_path):
    changes = dict(
        default_scope="mmengine",
        auto_scale_lr=dict(base_batch_size=256),
        env_cfg=dict(
            cudnn_benchmark=False,
            mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
            dist_cfg=dict(backend="nccl"),
        ),
        log_processor=dict(window_size=5, by_epoch=True),
        visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"),
        num_classes=3,
    )
    train(config(tmp_path, **changes))


def test_a_key_that_is_nearly_the_runners_is_a_warning(tmp_path):
    cfg = config(tmp_path)
    cfg["param_schedular"] = cfg.pop("param_scheduler")
    with pytest.warns(
        UserWarning, match="'param_schedular', which the Runner does not use; did you mean 'param_scheduler"
    ):
        Runner.from_cfg(cfg)


def test_it_is_one_beside_the_right_key_too(tmp_path):
    """As where a config inherits the right one."""
    with pytest.warns(UserWarning, match="'val_dataloder', .* did you mean 'val_dataloader'"):
        Runner.from_cfg(config(tmp_path, val_dataloder=dict(batch_size=3)))


@pytest.mark.parametrize("key", ["model", "work_dir"])
def test_the_keys_that_every_config_needs(tmp_path, key):
    cfg = config(tmp_path)
    del cfg[key]
    with pytest.raises(KeyError, match=f"needs the key '{key}'"):
        Runner.from_cfg(cfg)


def test_a_loop_of_ones_own(tmp_path):
    class Loud(EpochBasedTrainLoop):
        spoken: tuple = ()

        def run_epoch(self):
            self.spoken += (self.epoch,)
            super().run_epoch()

    runner = train(config(tmp_path, train_cfg=dict(type=Loud, max_epochs=2)))
    assert runner.train_loop.spoken == (0, 1)
    with pytest.raises(TypeError, match="must be a TrainLoop, got dict"):
        Runner.from_cfg(config(tmp_path, train_cfg=dict(type=dict, max_epochs=2)))


def test_load_from_takes_the_weights_that_fit(tmp_path, capsys):
    source = train(config(tmp_path / "source"))
    checkpoint = torch.load(tmp_path / "source" / "epoch_4.pth", weights_only=True)
    weights = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
    weights["module.head.weight"] = torch.zeros(5, 8)
    weights["module.extra"] = torch.zeros(1)
    torch.save(weights, tmp_path / "weights.pth")
    target = Runner.from_cfg(config(tmp_path / "target", load_from=tmp_path / "weights.pth"))
    before = target.model.head.weight.clone()
    target.load_or_resume()
    assert torch.equal(target.model.backbone[0].weight, source.model.backbone[0].weight)
    assert torch.equal(target.model.head.weight, before)
    output = capsys.readouterr().out
    assert (
        "it has module.extra, which the model does not have; head.weight has shape (5, 8) instead of shape (3, 8)"
        in output
    )
    with pytest.raises(CheckpointError, match=r"weights\.pth does not fit the model"):
        target.load_checkpoint(tmp_path / "weights.pth", strict=True)


def test_work_dir_and_its_files_are_made_by_the_run(tmp_path):
    runner = Runner.from_cfg(config(tmp_path / "deep" / "folder"))
    assert Path(runner.work_dir) == tmp_path / "deep" / "folder"
    assert list(Path(runner.work_dir).iterdir()) == []


class TestConfigFiles:
    """A Config from a file: it is named in errors, and saved beside the checkpoints."""

    @pytest.fixture
    def cfg(self, tmp_path: Path) -> Config:
        file = tmp_path / "points.py"
        settings = config(tmp_path / "work")
        file.write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()))
        return Config.fromfile(file)

    def test_it_is_saved_and_names_the_experiment(self, cfg, tmp_path):
        runner = Runner.from_cfg(cfg)
        runner.train()
        assert Config.fromfile(tmp_path / "work" / "points.py") == cfg
        assert runner.experiment_name == f"points_{runner.timestamp}"
        meta = torch.load(tmp_path / "work" / "epoch_1.pth", weights_only=True)["meta"]
        assert "FusedAdamW" in meta["cfg"]

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("model.type", "PointNets", "points.py: model: 'PointNets' is not in the model registry"),
            ("train_cfg.max_epochs", 0, "points.py: train_cfg: Invalid train_cfg.max_epochs"),
            ("optim_wrapper.optimizer.lr", -1, "points.py: optim_wrapper: "),
            ("val_evaluator.type", "Hits", "points.py: val_evaluator: "),
            ("val_dataloader.sampler.type", "Sample", "points.py: val_dataloader: "),
            ("default_hooks.logger.interval", 0, "points.py: default_hooks: "),
            ("custom_hooks", [dict(type="NoHook")], "points.py: custom_hooks: 'NoHook' is not in the hook registry"),
        ],
    )
    def test_errors_name_it(self, cfg, key, value, message):
        cfg.merge_from_dict({key: value})
        with pytest.raises(ConfigError, match=re.escape(message)):
            Runner.from_cfg(cfg)

    def test_what_cannot_be_saved_is_said(self, cfg, tmp_path, capsys):
        cfg.helper = lambda: None
        cfg.train_cfg.max_epochs = 2
        Runner.from_cfg(cfg).train()
        assert "The config is not saved beside the checkpoints" in capsys.readouterr().out

    def test_a_folder_of_its_name_is_said(self, cfg, tmp_path, capsys):
        (tmp_path / "work" / "points.py").mkdir(parents=True)
        cfg.train_cfg.max_epochs = 2
        Runner.from_cfg(cfg).train()
        assert "The config is not saved beside the checkpoints" in capsys.readouterr().out

    def test_a_work_dir_that_cannot_be_made(self, cfg, tmp_path):
        (tmp_path / "work").write_text("")
        with pytest.raises(ConfigError, match=r"points\.py: work_dir: .*exists"):
            Runner.from_cfg(cfg)

    def test_the_users_own_file_is_not_overwritten(self, cfg, tmp_path):
        cfg.work_dir = str(tmp_path)
        before = (tmp_path / "points.py").read_text()
        Runner.from_cfg(cfg).train()
        assert (tmp_path / "points.py").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_gpu_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid env_cfg\.device: 'cuda:1'; torch finds no usable CUDA device here"):
        Runner.from_cfg(config(tmp_path, env_cfg=dict(device="cuda:1")))


def test_a_folder_that_is_no_path_is_named(tmp_path):
    for wrong in (3, ""):
        with pytest.raises(TypeError, match=f"work_dir must be a path, got {wrong!r}"):
            Runner.from_cfg({**config(tmp_path), "work_dir": wrong})
