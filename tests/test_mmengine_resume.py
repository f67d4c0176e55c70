"""Checkpoints of MMEngine's Runner, resumed by ours: the same training comes out, or what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import by_iterations, loader
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS as THEIR_SCHEDULERS
from test_engine_parity import TheirRunner, numbers, settings

from fusedopt.training.engine import CheckpointError, Runner
from fusedopt.training.registry import PARAM_SCHEDULERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

EMA = dict(type="EMAHook", momentum=0.1)
SGD = dict(type="SGD", lr=1e-2, momentum=0.9, weight_decay=1e-4)
#: Changes of the config, and the checkpoint to resume from.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "AdamW by epoch": ({}, "epoch_2.pth"),
    "SGD by iteration": (by_iterations(optim_wrapper=dict(optimizer=SGD)), "iter_10.pth"),
    "in the middle of an epoch": (
        dict(
            optim_wrapper=dict(optimizer=dict(type="Adam", lr=1e-2)),
            train_dataloader=loader(40, 8, shuffle=False),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=7)),
        ),
        "iter_7.pth",
    ),
    "at the end of an epoch, by iterations": (
        dict(
            train_dataloader=loader(40, 8, shuffle=False),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5)),
            optim_wrapper=dict(optimizer=SGD),
            param_scheduler=[dict(type="StepLR", step_size=1, gamma=0.5)],
        ),
        "iter_10.pth",
    ),
    "after the best validation": (
        dict(
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="accuracy", rule="less")),
            param_scheduler=[dict(type="ReduceOnPlateauLR", monitor="count", rule="less", patience=0, factor=0.5)],
            optim_wrapper=dict(optimizer=SGD),
        ),
        "epoch_1.pth",
    ),
    "a 1cycle with a straight line": (
        dict(
            param_scheduler=dict(
                type="OneCycleLR", eta_max=0.1, total_steps=20, by_epoch=False, anneal_strategy="linear"
            )
        ),
        "epoch_2.pth",
    ),
    "an average of the weights": (dict(custom_hooks=[EMA]), "epoch_2.pth"),
    "a schedule by a metric": (
        dict(param_scheduler=[dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0)]),
        "epoch_2.pth",
    ),
}


def their_run(folder: Path, changes: dict[str, Any]) -> Any:
    cfg = settings(folder, changes)
    runner = TheirRunner.from_cfg(Config({**cfg, "experiment_name": f"resumed_{next(numbers)}"}))
    runner.train()
    return runner


def fused(changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` with the fused twin of the optimizer."""
    section = changes.get("optim_wrapper", settings(Path(), {})["optim_wrapper"])
    optimizer = section["optimizer"]
    return {**changes, "optim_wrapper": {**section, "optimizer": {**optimizer, "type": "Fused" + optimizer["type"]}}}


@pytest.mark.parametrize("twin", [False, True], ids=["same class", "fused twin"])
@pytest.mark.parametrize("case", CASES)
def test_the_rest_of_the_training_is_that_of_mmengine(case, twin, tmp_path):
    changes, name = CASES[case]
    their = their_run(tmp_path / "theirs", changes)
    changes = fused(changes) if twin else changes
    mine = Runner.from_cfg(
        {**settings(tmp_path / "mine", changes), "load_from": tmp_path / "theirs" / name, "resume": True}
    )
    mine.load_or_resume()
    number = int(name.removesuffix(".pth").rpartition("_")[2])
    assert mine.iter == (number if name.startswith("iter") else 5 * number)
    mine.train()
    assert mine.iter == their.iter == 20
    assert mine.optim_wrapper.get_lr()["lr"] == pytest.approx(their.optim_wrapper.get_lr()["lr"])
    for (key, value), expected in zip(mine.model.state_dict().items(), their.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=f"{case}: {key}", rtol=1e-5, atol=1e-6)


SCHEDULERS = {
    "ConstantLR": dict(end=5),
    "CosineAnnealingLR": dict(T_max=9),
    "CosineRestartLR": dict(periods=[4, 6, 9], restart_weights=[1, 0.5, 0.2], eta_min=0.0),
    "ExponentialLR": dict(gamma=0.9),
    "LinearLR": dict(start_factor=0.1, end=9),
    "MultiStepLR": dict(milestones=[3, 8]),
    "OneCycleLR": dict(eta_max=0.1, total_steps=20),
    "PolyLR": dict(power=2, end=20),
    "StepLR": dict(step_size=3),
    "ReduceOnPlateauLR": dict(patience=1, cooldown=1, factor=0.5),
    "LinearMomentum": dict(start_factor=0.1, end=9),
    "StepParamScheduler": dict(param_name="weight_decay", step_size=3),
}
LOSSES = [1.0, 0.5, 0.6, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_a_scheduler_goes_on_from_the_state_of_mmengine(kind, steps):
    def built(registry: Any) -> tuple[Any, Any]:
        params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
        groups = [dict(params=[each], lr=lr) for each, lr in zip(params, (0.1, 0.02), strict=True)]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
        return optimizer, registry.build(dict(type=kind, **SCHEDULERS[kind]), default_args=dict(optimizer=optimizer))

    def advance(optimizer: Any, scheduler: Any, losses: list[float]) -> list[Any]:
        values = []
        for loss in losses:
            optimizer.step()
            scheduler.step(*([dict(loss=loss)] if getattr(scheduler, "need_val_args", False) else []))
            values.append([(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups])
        return values

    optimizer, scheduler = built(THEIR_SCHEDULERS)
    advance(optimizer, scheduler, LOSSES[:steps])
    mine, own = built(PARAM_SCHEDULERS)
    mine.load_state_dict(optimizer.state_dict())
    own.load_state_dict(scheduler.state_dict())
    for values, expected in zip(
        advance(mine, own, LOSSES[steps:]), advance(optimizer, scheduler, LOSSES[steps:]), strict=True
    ):
        assert [number for group in values for number in group] == pytest.approx([n for g in expected for n in g])


class TestRefused:
    def checkpoint(
        self, folder: Path, changes: dict[str, Any], name: str = "epoch_2.pth"
    ) -> tuple[Path, dict[str, Any]]:
        their_run(folder, changes)
        return folder / name, torch.load(folder / name, weights_only=False)

    def refused(self, folder: Path, path: Path, message: str, **changes: Any) -> None:
        mine = Runner.from_cfg({**settings(folder, changes), "load_from": path, "resume": True})
        before = {name: value.clone() for name, value in mine.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            mine.load_or_resume()
        assert all(torch.equal(value, before[name]) for name, value in mine.model.state_dict().items())
        assert not mine.optim_wrapper.state_dict()["state"]

    def test_something_is_missing(self, tmp_path):
        hooks = dict(
            checkpoint=dict(type="CheckpointHook", interval=1, save_optimizer=False, save_param_scheduler=False)
        )
        path, checkpoint = self.checkpoint(tmp_path / "theirs", dict(default_hooks=hooks))
        self.refused(tmp_path / "mine", path, "this checkpoint of MMEngine lacks optimizer. load_from without resume")
        checkpoint["optimizer"] = dict(state={}, param_groups=[])
        torch.save(checkpoint, path)
        self.refused(tmp_path / "mine", path, "it lacks param_schedulers")

    @pytest.mark.parametrize("told", [True, False], ids=["in the config", "by the groups"])
    @pytest.mark.parametrize(
        ("theirs", "mine"),
        [("SGD", "AdamW"), ("Adam", "AdamW"), ("AdamW", "Adam"), ("NAdam", "Adam"), ("RAdam", "FusedAdam")],
    )
    def test_another_optimizer(self, theirs, mine, told, tmp_path):
        changes = dict(optim_wrapper=dict(optimizer=dict(type=theirs, lr=0.01)))
        path, checkpoint = self.checkpoint(tmp_path / "theirs", changes)
        if not told:
            checkpoint["meta"]["cfg"] = "model = Net()"
            torch.save(checkpoint, path)
        message = "is from other optimizers" if told or theirs[1:] != "Adam" else "neither the text of its config nor"
        self.refused(tmp_path / "mine", path, message, optim_wrapper=dict(optimizer=dict(type=mine, lr=0.01)))

    def test_an_import_path_as_the_type(self, tmp_path):
        changes = dict(optim_wrapper=dict(optimizer=dict(type="torch.optim.NAdam", lr=0.01)))
        path, _ = self.checkpoint(tmp_path / "theirs", changes)
        other = dict(optim_wrapper=dict(optimizer=dict(type="Adam", lr=0.01)))
        self.refused(tmp_path / "mine", path, "other optimizers: {'': 'NAdam'} instead of {'': 'Adam'}", **other)

    def test_another_kind_of_training(self, tmp_path):
        path, _ = self.checkpoint(tmp_path / "theirs", {})
        message = "from training by epochs, but this run is by iterations"
        self.refused(tmp_path / "mine", path, message, **by_iterations())

    def test_epochs_of_another_length(self, tmp_path, capsys):
        path, checkpoint = self.checkpoint(tmp_path / "theirs", {})
        mine = Runner.from_cfg(
            {
                **settings(tmp_path / "mine", {}),
                "train_dataloader": loader(40, 10, True),
                "load_from": path,
                "resume": True,
            }
        )
        mine.load_or_resume()
        assert mine.epoch == 2 and mine.train_loop.progress()["position"] == dict(passes=2, batches=0)
        assert "a run with 5 batches in an epoch, but this run has 4" in capsys.readouterr().out
        checkpoint["meta"].update(epoch=1, iter=7)
        torch.save(checkpoint, path)
        message = "written after 7 iterations, in an epoch of 5 batches, and this run has 4; the data or the batch"
        self.refused(tmp_path / "mine", path, message, train_dataloader=loader(40, 10, True))

    def test_the_best_file_of_the_other_run_is_not_removed(self, tmp_path):
        hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, save_best="accuracy", rule="less"))
        their = their_run(tmp_path / "theirs", dict(default_hooks=hooks))
        best = Path(their.message_hub.get_info("best_ckpt"))
        mine = Runner.from_cfg(
            {
                **settings(tmp_path / "mine", dict(default_hooks=hooks)),
                "load_from": best.parent / "epoch_1.pth",
                "resume": True,
            }
        )
        mine.train()
        assert best.exists() and mine.message_hub.get_info("best_score") is not None
