"""Checkpoints: a resumed training is the uninterrupted one, bit for bit, and a failure loses nothing."""

from __future__ import annotations

import collections
import contextlib
import errno
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engine_cases import (
    PointNet,
    Points,
    assert_refused,
    assert_same,
    by_iterations,
    config,
    foreign,
    loader,
    recorded,
    scalars,
    state_of,
    train,
)
from torch.utils.data import DataLoader

from fusedopt.training.engine import BaseMetric, CheckpointError, CheckpointHook, Config, DefaultSampler, Hook, Runner
from fusedopt.training.engine.checkpoint import find_latest_checkpoint, read_checkpoint, write_checkpoint
from fusedopt.training.files import UNFINISHED
from fusedopt.training.registry import HOOKS


class Interrupted(Exception):
    pass


class Interrupt(Hook):
    """Ends the process, as far as the Runner can tell, in the middle of an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise Interrupted


class Noise(Hook):
    """Draws random numbers everywhere, as any user's code may."""

    def _before_epoch(self, runner, mode="train"):
        torch.rand(3)

    def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train"):
        random.random(), np.random.rand(), torch.rand(1)


class PythonNoise(Points):
    """Augments with all three generators."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "inputs": item["inputs"] + 0.1 * random.random() + 0.1 * float(np.random.rand())}


def assert_resumes(cfg: dict[str, Any], interrupted_at: int, tmp_path: Path, *resumed_hooks: Hook) -> Runner:
    """Train through, and again with an interruption; both must end in the same state."""
    straight = train({**cfg, "work_dir": str(tmp_path / "straight")}, Noise())
    with pytest.raises(Interrupted):
        train({**cfg, "work_dir": str(tmp_path / "resumed")}, Noise(), Interrupt(interrupted_at))
    torch.manual_seed(999), random.seed(999), np.random.seed(999)
    resumed = train({**cfg, "work_dir": str(tmp_path / "resumed"), "resume": True}, Noise(), *resumed_hooks)
    losses = recorded(resumed).losses
    assert 0 < len(losses) < len(recorded(straight).losses), "it must have trained a part, and not all"
    assert losses.items() <= recorded(straight).losses.items()
    assert_same(state_of(resumed), state_of(straight))
    if straight.val_loop is not None:
        best = [{key: value for key, value in line.items() if "time" not in key} for line in scalars(straight.work_dir)]
        last = [{key: value for key, value in line.items() if "time" not in key} for line in scalars(resumed.work_dir)]
        assert [line for line in last if line in best] == last
        assert {str(line) for line in last} == {str(line) for line in best}
    return resumed


BY_ITERATION = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3))
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "by epoch": ({}, 13),
    "by epoch, in the middle of one": (dict(default_hooks=BY_ITERATION), 14),
    "by epoch, saved at the last iteration of one": (
        dict(default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5))),
        12,
    ),
    "by iteration": (by_iterations(), 13),
    "by iteration over finite data": (by_iterations(train_dataloader=loader(40, 8, shuffle=True)), 18),
    "by iteration, saved where the data ended": (
        by_iterations(
            train_dataloader=loader(40, 8, shuffle=True),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=10)),
        ),
        12,
    ),
    "accumulation, saved between two steps": (
        dict(
            optim_wrapper=dict(optimizer=dict(type="FusedSGD", lr=0.1, momentum=0.9), accumulative_counts=4),
            default_hooks=BY_ITERATION,
        ),
        11,
    ),
    "mixed precision": (
        dict(
            optim_wrapper=dict(
                type="AmpOptimWrapper",
                dtype="bfloat16",
                loss_scale=dict(init_scale=2.0**127, growth_interval=2),
                optimizer=dict(type="AdamW", lr=1e-2),
                clip_grad=dict(max_norm=0.1),
            ),
            default_hooks=BY_ITERATION,
        ),
        11,
    ),
    "the metric moves the learning rate and chooses the best": (
        dict(
            param_scheduler=dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0, factor=0.5),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, save_best="auto", max_keep_ckpts=1)),
        ),
        16,
    ),
    "workers": (dict(train_dataloader=dict(num_workers=2), default_hooks=BY_ITERATION), 14),
    "persistent workers": (
        dict(train_dataloader=dict(num_workers=2, persistent_workers=True), default_hooks=BY_ITERATION),
        14,
    ),
    "by iteration, with workers": (
        by_iterations(train_dataloader={**loader(40, 8, True, sampler="InfiniteSampler"), "num_workers": 2}),
        13,
    ),
    "by iteration over finite data, with a batch sampler": (
        by_iterations(
            train_dataloader={
                **loader(40, 8, shuffle=True),
                "batch_sampler": dict(type="torch.utils.data.BatchSampler", drop_last=False),
            },
            default_hooks=BY_ITERATION,
        ),
        14,
    ),
    "no seed": (dict(randomness={}, default_hooks=BY_ITERATION), 14),
    "BatchNorm": (dict(model=dict(type="PointNet", batch_norm=True), default_hooks=BY_ITERATION), 14),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    changes, interrupted_at = VARIANTS[name]
    data = {**loader(40, 8, shuffle=True), **changes.get("train_dataloader", {})}
    data["dataset"] = dict(type=PythonNoise, size=40)
    cfg = config(tmp_path, **{**changes, "train_dataloader": data})
    if name == "no seed":
        cfg["randomness"] = dict(seed=5)
        straight = train({**cfg, "work_dir": str(tmp_path / "straight")}, Noise())
        with pytest.raises(Interrupted):
            train({**cfg, "work_dir": str(tmp_path / "resumed")}, Noise(), Interrupt(interrupted_at))
        resumed = train({**cfg, "work_dir": str(tmp_path / "resumed"), "resume": True, "randomness": {}}, Noise())
        assert resumed.seed == 5
        assert_same(state_of(resumed), state_of(straight))
    else:
        assert_resumes(cfg, interrupted_at, tmp_path)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("ended_by", ["an error", "itself"])
def test_workers_end_with_the_run(persistent, ended_by, tmp_path):
    """The garbage collector would wait 5 seconds for each of them."""
    data = {**loader(40, 8, shuffle=True), "num_workers": 2, "persistent_workers": persistent}
    cfg = config(tmp_path, train_dataloader=data, val_dataloader=data)
    runner = Runner.from_cfg(cfg if ended_by == "itself" else {**cfg, "custom_hooks": [Interrupt(7)]})
    for _ in range(2):
        with contextlib.nullcontext() if ended_by == "itself" else pytest.raises(Interrupted):
            runner.train()
        assert not multiprocessing.active_children()
        runner.val()
        assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are few cores
@pytest.mark.parametrize(("workers", "batches"), [(2, 5), (4, 3)])
def test_persistent_workers_without_a_batch_in_the_rest_of_the_epoch(workers, batches, tmp_path):
    data = {**loader(8 * batches, 8, shuffle=True), "num_workers": workers, "persistent_workers": True}
    cfg = config(
        tmp_path,
        validates=False,
        train_cfg=dict(by_epoch=True, max_epochs=3),
        train_dataloader=data,
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1)),
    )
    straight = train(cfg)
    for iteration in (batches - 1, batches):
        start = tmp_path / f"iter_{iteration}.pth"
        resumed = train({**cfg, "work_dir": str(tmp_path / start.stem), "resume": True, "load_from": start})
        assert min(recorded(resumed).losses) == iteration
        assert_same(state_of(resumed), state_of(straight))


def test_a_loader_of_the_users_own_resumes_too(tmp_path):
    """torch's sampler draws its seed from the generator of the training; what was trained on is loaded once more."""
    for generator in (None, torch.Generator().manual_seed(3)):
        folder = tmp_path / str(generator is None)

        def cfg(generator=generator, folder=folder):
            if generator is not None:
                generator.manual_seed(3)
            data = DataLoader(PythonNoise(40), batch_size=8, shuffle=True, generator=generator)
            return config(folder, train_dataloader=data, default_hooks=BY_ITERATION)

        straight = train({**cfg(), "work_dir": str(folder / "straight")}, Noise())
        with pytest.raises(Interrupted):
            train({**cfg(), "work_dir": str(folder / "resumed")}, Noise(), Interrupt(14))
        resumed = train({**cfg(), "work_dir": str(folder / "resumed"), "resume": True}, Noise())
        assert min(recorded(resumed).losses) == 12
        assert_same(state_of(resumed), state_of(straight))


def test_workers_of_a_loader_of_the_users_own_draw_what_they_drew(tmp_path):
    def cfg(folder):
        points = PythonNoise(40)
        data = DataLoader(points, batch_size=8, sampler=DefaultSampler(points, seed=3), num_workers=2)
        return config(tmp_path / folder, validates=False, train_dataloader=data, default_hooks=BY_ITERATION)

    straight = train(cfg("straight"))
    resumed = train({**cfg("resumed"), "resume": True, "load_from": tmp_path / "straight" / "iter_12.pth"})
    assert min(recorded(resumed).losses) == 12
    assert_same(state_of(resumed), state_of(straight))


def test_several_optimizers_that_take_turns_resume_between_their_steps(tmp_path):
    class TwoPlayers(PointNet):
        def train_step(self, data, optim_wrapper):
            for name in ("backbone", "head"):
                wrapper = optim_wrapper[name]
                with wrapper.optim_context(self):
                    loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
                wrapper.update_params(loss)
            return {"loss": loss.detach()}

    optim_wrapper = dict(
        constructor="MultiOptimWrapperConstructor",
        backbone=dict(optimizer=dict(type="FusedSGD", lr=0.1), accumulative_counts=2),
        head=dict(optimizer=dict(type="FusedAdam", lr=1e-2), accumulative_counts=5),
    )
    cfg = config(
        tmp_path,
        model=dict(type=TwoPlayers),
        optim_wrapper=optim_wrapper,
        param_scheduler=dict(backbone=dict(type="ExponentialLR", gamma=0.5), head=[]),
        default_hooks=BY_ITERATION,
    )
    resumed = assert_resumes(cfg, 14, tmp_path)
    assert resumed.optim_wrapper["head"].inner_count == 20


@pytest.mark.parametrize(("first", "second"), [("AdamW", "FusedAdamW"), ("FusedAdamW", "AdamW"), ("SGD", "FusedSGD")])
def test_the_optimizer_may_be_fused_in_between(first, second, tmp_path):
    """The states have one layout: what one has begun the other goes on with."""

    def cfg(kind: str, folder: str, **changes: Any) -> dict[str, Any]:
        settings = dict(momentum=0.9) if "SGD" in kind else dict(weight_decay=0.1)
        wrapper = dict(optimizer=dict(type=kind, lr=1e-2, **settings), clip_grad=dict(max_norm=1.0))
        return config(tmp_path / folder, optim_wrapper=wrapper, **changes)

    straight = train(cfg(first, "straight"))
    with pytest.raises(Interrupted):
        train(cfg(first, "resumed"), Interrupt(12))
    resumed = train(cfg(second, "resumed", resume=True))
    assert min(recorded(resumed).losses) == 10
    for one, other in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    moved = Runner.from_cfg(cfg(first, "straight")).model
    assert not all(map(torch.allclose, resumed.model.parameters(), moved.parameters()))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("after_train_iter", {}),
        ("after_train_epoch", {}),
        ("after_val_epoch", {}),
        ("after_train_iter", by_iterations()),
        ("after_val_epoch", by_iterations()),
    ],
)
def test_a_checkpoint_may_be_saved_after_anything(tmp_path, stage, changes):
    class Saver(Hook):
        priority = "LOWEST"

        def _save(self, runner, **kwargs):
            if runner.iter >= 10 and not (tmp_path / "mine.pth").exists():
                runner.save_checkpoint(tmp_path, "mine.pth")

    setattr(Saver, stage, Saver._save)
    changes = dict(changes, default_hooks=dict(checkpoint=None))
    straight = train(config(tmp_path / "straight", **changes), Saver())
    resumed = train(config(tmp_path / "resumed", resume=True, load_from=tmp_path / "mine.pth", **changes))
    assert 5 <= len(recorded(resumed).losses) <= 10
    assert recorded(resumed).metrics == recorded(straight).metrics[-len(recorded(resumed).metrics) :]
    assert_same(state_of(resumed), state_of(straight))


def test_resuming_a_finished_training_does_nothing(tmp_path):
    finished = train(config(tmp_path))
    again = train(config(tmp_path, resume=True))
    assert recorded(again).losses == {} and recorded(again).lrs == []
    assert len(recorded(again).metrics) == 1, "the validation that followed the checkpoint is made up for"
    assert_same(state_of(again), state_of(finished))


def test_resume_with_nothing_to_resume_begins(tmp_path, capsys):
    runner = train(config(tmp_path, resume=True, log_level="INFO"))
    assert len(recorded(runner).losses) == 20
    assert f"There is no checkpoint in {tmp_path} to resume from: starting from scratch" in capsys.readouterr().out


def test_resume_of_a_checkpoint_that_is_named(tmp_path):
    straight = train(config(tmp_path / "one"))
    runner = train(config(tmp_path / "two", resume=True, load_from=str(tmp_path / "one" / "epoch_2.pth")))
    assert min(recorded(runner).losses) == 10
    assert_same(state_of(runner), state_of(straight))


def test_a_work_dir_may_be_moved(tmp_path):
    straight = train(config(tmp_path / "straight"))
    with pytest.raises(Interrupted):
        train(config(tmp_path / "before"), Interrupt(12))
    (tmp_path / "before").rename(tmp_path / "after")
    assert_same(state_of(train(config(tmp_path / "after", resume=True))), state_of(straight))


class OwnSampler(torch.utils.data.Sampler):
    """One order of the seed, in all epochs."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __iter__(self):
        return iter(torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed)).tolist())

    def __len__(self):
        return len(self.dataset)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(sampler=dict(type=OwnSampler)),
        dict(batch_sampler=dict(type="torch.utils.data.BatchSampler", drop_last=False)),
    ],
    ids=["sampler", "sampler of one's own", "sampler of a batch sampler"],
)
def test_another_seed_gives_way_to_that_of_the_checkpoint(changes, tmp_path, capsys):
    data = {**loader(40, 8, shuffle=True), **changes}
    straight = train(config(tmp_path / "straight", train_dataloader=data))
    with pytest.raises(Interrupted):
        train(config(tmp_path / "resumed", train_dataloader=data), Interrupt(12))
    resumed = train(config(tmp_path / "resumed", train_dataloader=data, resume=True, randomness=dict(seed=7)))
    assert "has the seed 0, which is used instead of 7" in capsys.readouterr().out
    assert_same(state_of(resumed), state_of(straight))


def test_other_data_are_a_warning(tmp_path, capsys):
    train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
    train(config(tmp_path, resume=True, train_dataloader=loader(48, 8, shuffle=True)))
    assert "from a run with 5 batches in an epoch, but this run has 6" in capsys.readouterr().out


class TestFilesOfTheHook:
    """Which files there are, and what is in them."""

    def names(self, folder: Path) -> set[str]:
        return {path.name for path in folder.glob("*.pth*")}

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            (dict(interval=1), {f"epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)}),
            (dict(interval=3), {"epoch_3.pth", "epoch_4.pth"}),
            (dict(interval=3, save_last=False), {"epoch_3.pth"}),
            (dict(interval=1, max_keep_ckpts=2), {"epoch_3.pth", "epoch_4.pth"}),
            (dict(interval=2, save_begin=1), {"epoch_1.pth", "epoch_3.pth", "epoch_4.pth"}),
            (dict(), {"epoch_4.pth"}),
            (dict(save_last=False), set()),
            (dict(by_epoch=False, interval=8), {"iter_8.pth", "iter_16.pth", "iter_20.pth"}),
            (dict(interval=2, filename_tmpl="net-{}.pt"), set()),
        ],
    )
    def test_intervals(self, tmp_path, settings, names):
        train(config(tmp_path, default_hooks=dict(checkpoint=dict(type="CheckpointHook", **settings))))
        assert self.names(tmp_path) == names
        if "filename_tmpl" in settings:
            assert {path.name for path in tmp_path.glob("*.pt")} == {"net-2.pt", "net-4.pt"}

    def test_what_is_in_a_file(self, tmp_path):
        train(config(tmp_path))
        checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
        assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers"} <= set(checkpoint)
        assert (checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"], checkpoint["meta"]["seed"]) == (2, 10, 0)
        PointNet().load_state_dict(checkpoint["state_dict"])
        optimizer = torch.optim.AdamW(PointNet().parameters())
        optimizer.load_state_dict(checkpoint["optimizer"])

    def test_another_folder(self, tmp_path):
        hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, out_dir=str(tmp_path / "out")))
        cfg = config(tmp_path / "work", default_hooks=hooks)
        straight = train(cfg)
        assert len(self.names(tmp_path / "out" / "work")) == 4 and not self.names(tmp_path / "work")
        assert_same(state_of(train({**cfg, "resume": True})), state_of(straight))

    def scores(self, tmp_path: Path, scores: list[float], **settings: Any) -> set[str]:
        """The best checkpoints that are left when validations give these scores."""

        class Given(Hook):
            priority = "HIGHEST"

            def after_val_epoch(self, runner, metrics=None):
                metrics["val/score"] = scores[runner.epoch - 1]
                metrics["loss"] = -scores[runner.epoch - 1]

        hook = dict(type="CheckpointHook", **settings)
        train(
            config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=4), default_hooks=dict(checkpoint=hook)), Given()
        )
        return {name for name in self.names(tmp_path) if name.startswith("best")}

    def test_the_best(self, tmp_path):
        best = dict(save_best="val/score", rule="greater")
        assert self.scores(tmp_path / "a", [1, 3, 2, 3], **best) == {"best_val_score_epoch_2.pth"}
        assert self.scores(tmp_path / "b", [3, 1, 2, 4], save_best="val/score", rule="less") == {
            "best_val_score_epoch_2.pth"
        }
        assert self.scores(tmp_path / "e", [3, 3, 2, 3], **best) == {
            "best_val_score_epoch_1.pth"
        }  # the first of equals
        assert self.scores(tmp_path / "c", [1, 3, 2, 0], save_best="loss") == {"best_loss_epoch_2.pth"}
        several = dict(save_best=["val/score", "loss"], rule=["less", "less"])
        assert self.scores(tmp_path / "d", [2, 3, 1, 2], **several) == {
            "best_val_score_epoch_3.pth",
            "best_loss_epoch_2.pth",
        }
        assert self.scores(tmp_path / "e", [1, 2, 3, float("nan")], **best) == {"best_val_score_epoch_3.pth"}
        checkpoint = torch.load(tmp_path / "a" / "best_val_score_epoch_2.pth", weights_only=True)
        assert "optimizer" not in checkpoint and checkpoint["meta"]["epoch"] == 2

    def test_auto_is_the_first_metric(self, tmp_path):
        train(config(tmp_path, default_hooks=dict(checkpoint=dict(type="CheckpointHook", save_best="auto"))))
        assert {name for name in self.names(tmp_path) if name.startswith("best_accuracy_epoch_")}

    def test_a_metric_that_is_not_there(self, tmp_path):
        hook = dict(type="CheckpointHook", save_best="acuracy", rule="greater")
        with pytest.raises(KeyError, match=r"save_best='acuracy' is not among the metrics; did you mean 'accuracy'\?"):
            train(config(tmp_path, default_hooks=dict(checkpoint=hook)))

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            (dict(interval=0), ValueError, "Invalid interval: 0"),
            (dict(interval="1"), TypeError, "Invalid interval: '1'; expected a whole number"),
            (dict(max_keep_ckpts=0), ValueError, "Invalid max_keep_ckpts: 0"),
            (dict(save_best="score"), ValueError, "save_best='score': its name does not say"),
            (dict(save_best="acc", rule="more"), ValueError, "Invalid rule: 'more'; expected one of greater, less"),
            (dict(save_best=["acc", "loss"], rule=["less"] * 3), ValueError, "rule has 3 entries for 2 metrics"),
            (dict(save_best=["acc", "acc"]), ValueError, "save_best must name each metric once"),
            (dict(save_best=3), TypeError, "save_best"),
            (dict(filename_tmpl="net.pth"), ValueError, "filename_tmpl must have {} once"),
            (dict(max_keep=3), TypeError, "did you mean 'max_keep_ckpts'?"),
        ],
    )
    def test_wrong_settings(self, settings, error, message):
        with pytest.raises(error, match=re.escape(message)):
            HOOKS.build(dict(type="CheckpointHook", **settings))

    @pytest.mark.parametrize(
        ("metric", "rule"),
        [("accuracy", "greater"), ("top1", "greater"), ("bbox_mAP", "greater"), ("val_loss", "less"), ("loss", "less")],
    )
    def test_the_name_of_a_metric_tells_the_rule(self, metric, rule):
        assert CheckpointHook(save_best=metric).rules == {metric: rule}


class TestFailures:
    """A failure leaves what was there, and says what happened."""

    def test_a_full_disk_leaves_the_old_checkpoint(self, tmp_path, monkeypatch):
        write = torch.save

        def full(checkpoint, file):
            if checkpoint["meta"]["epoch"] == 3:
                file.write(b"begun")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(checkpoint, file)

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"epoch_3\.pth cannot be written .*: .*No space left on device"):
            train(config(tmp_path / "resumed", default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1))))
        folder = tmp_path / "resumed"
        assert {path.name for path in folder.glob("*epoch*")} == {"epoch_1.pth", "epoch_2.pth"}
        assert (folder / "last_checkpoint").read_text() == str(folder / "epoch_2.pth")
        monkeypatch.setattr(torch, "save", write)
        straight = train(config(tmp_path / "straight"))
        assert_same(state_of(train(config(folder, resume=True))), state_of(straight))

    def test_a_full_disk_leaves_the_checkpoint_of_the_same_name(self, tmp_path, monkeypatch):
        path = tmp_path / "epoch_1.pth"
        write_checkpoint(dict(meta={}, value=torch.ones(2)), path)
        before = path.read_bytes()

        def fsync(descriptor):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(CheckpointError, match=r"epoch_1\.pth cannot be written and is unchanged"):
            write_checkpoint(dict(meta={}, value=torch.zeros(2)), path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

    def test_what_could_not_be_loaded_again_is_not_written(self, tmp_path):
        class Careless(Hook):
            def before_save_checkpoint(self, runner, checkpoint):
                checkpoint["message_hub"]["runtime_info"]["hook"] = [1, self]

        message = "checkpoint['message_hub']['runtime_info']['hook'][1] (Careless) is neither a tensor nor a"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            train(config(tmp_path), Careless())
        assert not list(tmp_path.glob("*.pth*"))

    @pytest.mark.parametrize("missing", [1, 100, 2000])
    def test_a_truncated_checkpoint(self, tmp_path, missing):
        train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
        path = tmp_path / "epoch_2.pth"
        path.write_bytes(path.read_bytes()[:-missing])
        assert_refused(tmp_path, r"epoch_2\.pth: truncated or damaged")

    def test_an_empty_and_a_missing_checkpoint(self, tmp_path):
        train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
        (tmp_path / "epoch_2.pth").write_bytes(b"")
        assert_refused(tmp_path, r"epoch_2\.pth: neither a file of torch\.save nor")
        (tmp_path / "epoch_2.pth").unlink()
        assert_refused(tmp_path, r"last_checkpoint names .*epoch_2\.pth, which does not exist")
        with pytest.raises(CheckpointError, match=r"nowhere\.pth: there is no such checkpoint"):
            Runner.from_cfg(config(tmp_path, resume=True, load_from="nowhere.pth")).train()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(meta=None), "epoch_2.pth cannot be resumed from: it lacks meta. load_from without resume"),
            (dict(optimizer=None, processes=None), "it lacks optimizer, processes."),
            (dict(meta=dict(epoch=2, iter=10)), "it lacks meta['position'], meta['validation_due']"),
            (dict(meta=[1]), "it lacks meta."),
            (dict(param_schedulers=None), "it lacks param_schedulers."),
            (dict(param_schedulers=[{}]), "epoch_2.pth cannot be resumed from: it has 1 schedulers instead of 2"),
            (dict(param_schedulers=dict(gen=[])), "of one optimizer and schedulers of several do not fit"),
            (dict(state_dict=dict(weight=torch.ones(3))), "does not fit the model: it lacks backbone.0.weight"),
            (dict(state_dict=dict(weight="none")), "epoch_2.pth has no weights"),
            (dict(optimizer=dict(state={}, param_groups=[])), "epoch_2.pth cannot be resumed from: "),
            (dict(accumulation=dict(generator=1)), "is from other optimizers: generator instead of one"),
            (dict(accumulation={"": None}), "accumulation[''] is None; expected a whole number of at least 0"),
            (dict(processes=[{}]), "processes[0]['random'] is None; expected a dict"),
            (
                dict(processes=[dict(random={}, pass_random={}, gradients={}, buffers={})]),
                "the states of random generators in 'random' are not as they were written (KeyError",
            ),
            (
                dict(processes=[dict(random={}, pass_random={}, gradients=None, buffers={})]),
                "processes[0]['gradients'] is",
            ),
            (dict(message_hub=dict(log_scalars=[])), "epoch_2.pth cannot be resumed from: "),
        ],
    )
    def test_a_foreign_checkpoint_changes_nothing(self, tmp_path, changes, message):
        foreign(tmp_path, **changes)
        assert_refused(tmp_path, re.escape(message))

    @pytest.mark.parametrize(
        ("first", "second"),
        [("FusedSGD", "FusedAdamW"), ("AdamW", "SGD"), ("FusedAdam", "FusedAdamW"), ("SGD", "AdamW")],
    )
    def test_the_checkpoint_of_another_optimizer(self, tmp_path, first, second):
        train(config(tmp_path, optim_wrapper=dict(optimizer=dict(type=first, lr=0.01))))
        runner = Runner.from_cfg(
            config(tmp_path, optim_wrapper=dict(optimizer=dict(type=second, lr=0.01)), resume=True)
        )
        before = state_of(runner)
        names = [name.removeprefix("Fused") for name in (first, second)]
        with pytest.raises(
            CheckpointError, match=rf"from other optimizers: .*'{names[0]}'}} instead of .*'{names[1]}'}}"
        ):
            runner.load_or_resume()
        assert_same(state_of(runner), before)

    def test_an_optimizers_state_that_is_half_there(self, tmp_path):
        wrapper = dict(optim_wrapper=dict(optimizer=dict(type="FusedAdamW", lr=0.01)))
        train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2), **wrapper))
        path = tmp_path / "epoch_2.pth"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["optimizer"]["state"][1]["exp_avg_sq"]
        torch.save(checkpoint, path)
        runner = Runner.from_cfg(config(tmp_path, resume=True, **wrapper))
        before = state_of(runner)
        message = r"epoch_2.pth cannot be resumed from: loaded state of parameter .*\[1\].* has no 'exp_avg_sq'"
        with pytest.raises(CheckpointError, match=message):
            runner.load_or_resume()
        assert_same(state_of(runner), before)

    def test_a_weight_that_is_no_tensor(self, tmp_path):
        weights = dict(Runner.from_cfg(config(tmp_path)).bare_model.state_dict())
        name = next(reversed(weights))
        foreign(tmp_path, state_dict={**weights, name: 3})
        assert_refused(tmp_path, re.escape(f"does not fit the model: {name} has a int instead of shape"))

    def test_where_no_folder_can_be(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        hook = dict(type="CheckpointHook", interval=1, out_dir=tmp_path / "file")
        with pytest.raises(CheckpointError, match=r"epoch_1\.pth cannot be written"):
            train(config(tmp_path, default_hooks=dict(checkpoint=hook)))

    def test_a_disk_that_became_read_only(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "fsync", refuse)
        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be written and is unchanged: .*Read-only"):
            write_checkpoint(dict(value=1), tmp_path / "file.pth")

    def test_file_and_folder_are_brought_to_the_disk(self, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
        write_checkpoint(dict(value=1), tmp_path / "file.pth")
        assert synced == [str(tmp_path / f"file.pth{UNFINISHED}"), str(tmp_path)]

    @pytest.mark.parametrize("value", [collections.defaultdict(int, a=1), Config(dict(a=1))])
    def test_dicts_of_other_kinds_are_not_written(self, tmp_path, value):
        with pytest.raises(CheckpointError, match=rf"checkpoint\['mine'\] \({type(value).__name__}\) is neither"):
            write_checkpoint(dict(mine=value), tmp_path / "file.pth")
        write_checkpoint(dict(mine=collections.Counter([1, 1])), tmp_path / "file.pth")
        assert read_checkpoint(tmp_path / "file.pth")["mine"] == {1: 2}

    def test_what_the_hub_took_from_a_checkpoint_is_undone(self, tmp_path):
        class Picky(Hook):
            def after_load_checkpoint(self, runner, checkpoint):
                assert runner.message_hub.get_info("iter")
                raise ValueError("not this one")

        train(config(tmp_path))
        runner = Runner.from_cfg(config(tmp_path, resume=True, custom_hooks=[Picky()]))
        before = runner.message_hub.state_dict()
        with pytest.raises(CheckpointError, match="not this one"):
            runner.load_or_resume()
        assert runner.message_hub.state_dict() == before

    def test_without_a_training_there_is_nothing_to_save(self, tmp_path):
        cfg = config(tmp_path)
        without = {key: cfg[key] for key in cfg if not key.startswith(("train", "optim", "param"))}
        with pytest.raises(RuntimeError, match="nothing to save: the config does not train"):
            Runner.from_cfg(without).save_checkpoint(tmp_path, "file.pth")

    def test_the_checkpoint_of_another_kind_of_training(self, tmp_path):
        train(config(tmp_path))
        with pytest.raises(CheckpointError, match="from training by epochs, but this run is by iterations"):
            Runner.from_cfg(config(tmp_path, **by_iterations(), resume=True)).train()

    @pytest.mark.parametrize("content", [[torch.ones(2)], dict(a=1), torch.nn.Linear(2, 2)])
    def test_a_file_that_is_no_checkpoint(self, tmp_path, content):
        train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
        torch.save(content, tmp_path / "epoch_2.pth")
        assert_refused(tmp_path, "epoch_2.pth")
        with pytest.raises(CheckpointError, match=r"epoch_2\.pth"):
            Runner.from_cfg(config(tmp_path)).load_checkpoint(tmp_path / "epoch_2.pth")

    def test_a_hook_that_refuses_a_checkpoint_changes_nothing(self, tmp_path):
        class Picky(Hook):
            def after_load_checkpoint(self, runner, checkpoint):
                raise ValueError("it has no averaged weights")

        train(config(tmp_path))
        runner = Runner.from_cfg(config(tmp_path, resume=True, custom_hooks=[Picky()]))
        before = state_of(runner)
        with pytest.raises(CheckpointError, match=r"epoch_4\.pth cannot be resumed from: it has no averaged weights"):
            runner.load_or_resume()
        assert_same(state_of(runner), before)

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        tmp_path.joinpath(f"epoch_9.pth{UNFINISHED}").write_bytes(b"half")
        train(config(tmp_path))
        assert not list(tmp_path.glob(f"*{UNFINISHED}"))

    def test_an_object_in_a_checkpoint_is_not_built_and_not_resumed(self, tmp_path):
        class Exploit:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        path = foreign(tmp_path, bad=Exploit())
        assert_refused(tmp_path, r"checkpoint\['bad'\] \(posix\.system\) is neither a tensor nor plain")
        Runner.from_cfg(config(tmp_path)).load_checkpoint(path)
        assert not (tmp_path / "ran").exists()


KILLED = """
import io, os, signal, sys
from pathlib import Path

import torch

sys.path.insert(0, {tests!r})
from engine_cases import by_iterations, config, loader, state_of
from fusedopt.training.engine import Hook, Runner

folder, iteration, place, calls = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])


class Progress(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        print(runner.iter, flush=True)


def dying(owner, name, before_dying=lambda *args: None):
    original = getattr(owner, name)

    def call(*args, **kwargs):
        global calls
        if runner.iter >= iteration:
            calls -= 1
            if calls < 0:
                before_dying(*args)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def half(checkpoint, file, save=torch.save):
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()


torch.set_num_threads(1)
changes = by_iterations(
    train_cfg=dict(by_epoch=False, max_iters={max_iters}, val_interval=50),
    default_hooks=dict(
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2, max_keep_ckpts=2, save_best="auto")),
    optim_wrapper=dict(
        optimizer=dict(type="FusedAdamW", lr=1e-3), clip_grad=dict(max_norm=1.0), accumulative_counts=3),
)
if {by_epoch}:
    changes.update(
        train_cfg=dict(by_epoch=True, max_epochs=120), train_dataloader=loader(40, 8, shuffle=True),
        param_scheduler=dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=3))
runner = Runner.from_cfg(config(folder, resume=True, custom_hooks=[Progress()], **changes))
if place == "save":
    dying(torch, "save", half)
elif place == "unlink":
    dying(Path, "unlink")
elif place:
    dying(os, place)
runner.train()
torch.save(state_of(runner), folder + "/final.pt")
"""
#: Where a process kills itself while it saves: in the middle of the file, before it is on the disk, before it has its
#: name, before an older one is removed.
PLACES = ("save", "fsync", "replace", "unlink")


@pytest.mark.slow
@pytest.mark.parametrize("by_epoch", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_process_killed_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path, by_epoch, thorough):
    """It is killed at a random moment, or while it saves."""
    deaths = [place for saving in (*PLACES, *PLACES, *PLACES) for place in ("", saving)] if thorough else ["", *PLACES]
    script = tmp_path / "training.py"
    max_iters = 20 * len(deaths) + 60
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), by_epoch=by_epoch, max_iters=max_iters))

    def start(folder: Path, *death: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(folder), *map(str, death or (0, "", 0))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    generator = random.Random(0)
    folder, resumed_at = tmp_path / "killed", []
    for kill, place in enumerate(deaths):
        iteration = 20 * kill + generator.randrange(20)
        with start(folder, iteration, place, generator.randrange(4)) as process:
            assert process.stdout is not None
            for number, line in enumerate(process.stdout):
                if number == 0:
                    resumed_at.append(int(line))
                if not place and int(line) >= iteration:
                    time.sleep(generator.uniform(0, 0.005))
                    process.kill()
                    break
            _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors
    assert resumed_at == sorted(resumed_at) and resumed_at[-1] > 10 * len(deaths)
    for each in (folder, tmp_path / "straight"):
        with start(each) as process:
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    final, expected = (torch.load(each / "final.pt", weights_only=False) for each in (folder, tmp_path / "straight"))
    assert_same(final, expected)
    assert {path.name for path in folder.glob("*.pth")} == {path.name for path in (tmp_path / "straight").glob("*.pth")}


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["by epoch, in the middle of one", "mixed precision"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_a_training_on_a_gpu_resumes_with_its_generator(name, device, tmp_path):
    changes, interrupted_at = VARIANTS[name]
    cfg = config(tmp_path, **changes, model=dict(type="PointNet", dropout=0.5), env_cfg=dict(device=device))
    resumed = assert_resumes(cfg, interrupted_at, tmp_path)
    assert next(resumed.model.parameters()).is_cuda


class Renamed(torch.nn.Module):
    """A layer of version 2, whose weight had another name in version 1."""

    _version = 2
    versions: ClassVar[list] = []

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.versions.append(local_metadata.get("version"))
        if prefix + "old" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "old")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("hooks", [[], [dict(type="EMAHook")]])
def test_modules_know_the_versions_of_their_weights(tmp_path, hooks):
    def model():
        made = PointNet()
        made.renamed = Renamed()
        return made

    train(config(tmp_path, model=model(), custom_hooks=hooks, model_wrapper_cfg=None))
    Renamed.versions.clear()
    Runner.from_cfg(config(tmp_path, model=model(), resume=True, custom_hooks=hooks)).load_or_resume()
    assert set(Renamed.versions) == {2}
    Renamed.versions.clear()
    Runner.from_cfg(config(tmp_path / "other", model=model(), load_from=tmp_path / "epoch_4.pth")).load_or_resume()
    assert set(Renamed.versions) == {2}


def test_weights_under_old_names_are_for_the_model_to_take(tmp_path):
    made = PointNet()
    made.renamed = Renamed()
    weights = {name.replace("renamed.weight", "renamed.old"): value for name, value in made.state_dict().items()}
    weights["renamed.old"] = torch.ones(2)
    torch.save(weights, tmp_path / "old.pth")
    runner = Runner.from_cfg(config(tmp_path, model=made, load_from=tmp_path / "old.pth"))
    runner.load_or_resume()
    assert torch.equal(made.renamed.weight, torch.ones(2))


def test_averaged_weights_without_their_hook_are_a_warning(tmp_path, capsys):
    train(config(tmp_path, custom_hooks=[dict(type="EMAHook")]))
    Runner.from_cfg(config(tmp_path, resume=True)).load_or_resume()
    assert "has the averaged weights of an EMAHook" in capsys.readouterr().out


def test_everything_is_closed_although_something_cannot_be(tmp_path):
    class Stuck(Hook):
        closed: ClassVar[list] = []

        def close(self):
            self.closed.append(self)
            raise OSError("stuck")

        def before_train(self, runner):
            raise ValueError("the real one")

    hooks = [Stuck(), Stuck()]
    with pytest.raises(OSError, match="stuck") as caught:
        train(config(tmp_path), *hooks)
    errors = []
    error = caught.value
    while error is not None:
        errors.append(str(error))
        error = error.__context__
    assert errors == ["stuck", "stuck", "the real one"] and Stuck.closed == hooks


def test_the_best_metric_must_be_a_number(tmp_path):
    class Parts(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(0.0)

        def compute_metrics(self, results):
            return {"parts": {"a": 1.0}}

    hook = dict(type="CheckpointHook", interval=1, save_best="auto", rule="greater")
    with pytest.raises(TypeError, match="save_best='parts' is a dict, not a number"):
        train(config(tmp_path, val_evaluator=Parts(), default_hooks=dict(checkpoint=hook)))


class TestLastCheckpoint:
    def test_mmengine_finds_it(self, tmp_path):
        find = pytest.importorskip("mmengine.runner", reason="mmengine is not installed").find_latest_checkpoint
        train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
        assert find(str(tmp_path)) == str(tmp_path / "epoch_2.pth") == str(find_latest_checkpoint(tmp_path))

    def test_a_folder_that_was_moved(self, tmp_path):
        train(config(tmp_path / "before", train_cfg=dict(by_epoch=True, max_epochs=2)))
        (tmp_path / "before").rename(tmp_path / "after")
        assert find_latest_checkpoint(tmp_path / "after") == tmp_path / "after" / "epoch_2.pth"

    @pytest.mark.parametrize("content", ["epoch_1.pth", "work/epoch_1.pth", "elsewhere/gone/epoch_1.pth\n"])
    def test_what_mmengine_and_older_versions_wrote(self, content, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "work").mkdir()
        (tmp_path / "epoch_1.pth").touch()  # of something else
        (tmp_path / "work" / "epoch_1.pth").touch()
        (tmp_path / "work" / "last_checkpoint").write_text(content)
        assert find_latest_checkpoint("work") == Path("work/epoch_1.pth")
