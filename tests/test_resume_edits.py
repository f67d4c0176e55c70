"""A config that is edited before its training is resumed: what has no effect is told, or counts on request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import assert_same, by_iterations, config, recorded, state_of, train

import fusedopt
from fusedopt.cli import main
from fusedopt.training.engine import CheckpointError, Config, Hook, Runner
from fusedopt.training.engine.settings import differing, optimizer_settings, scheduler_settings
from fusedopt.training.schedulers import StepLR
from fusedopt.training.wrappers import OptimWrapper


class Watch(Hook):
    """Keeps the settings of the groups in each iteration."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        groups = runner.optim_wrapper.param_groups
        self.seen[runner.iter] = [{key: group[key] for key in sorted(group) if key != "params"} for group in groups]


def base(folder: Path, **changes: Any) -> dict[str, Any]:
    cfg = config(
        folder,
        validates=False,
        optim_wrapper=dict(
            type="AmpOptimWrapper",
            dtype="bfloat16",
            loss_scale=dict(init_scale=4.0, growth_interval=100),
            optimizer=dict(type="FusedAdamW", lr=0.01, weight_decay=0.05),
            paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(head=dict(lr_mult=2.0))),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=6),
            dict(type="StepLR", step_size=1, gamma=0.5),
            dict(type="CosineAnnealingMomentum"),
        ],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=8)),
    )
    return {**cfg, **changes}


def edited(cfg: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    made = Config(cfg)
    made.merge_from_dict(edits)
    return made.to_dict()


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "was edited since" in line]


#: What is edited, and what the warning has.
EDITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lr": ({"optim_wrapper.optimizer.lr": 0.02}, ["optim_wrapper.optimizer.lr was 0.01 and is 0.02"]),
    "weight decay": (
        {"optim_wrapper.optimizer.weight_decay": 0.5},
        ["optim_wrapper.optimizer.weight_decay was 0.05 and is 0.5"],
    ),
    "a default": (
        {"optim_wrapper.optimizer.betas": (0.8, 0.99)},
        ["optim_wrapper.optimizer.betas was [0.9, 0.999] and is [0.8, 0.99]"],
    ),
    "a multiplier": (
        {"optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult": 3.0},
        ["optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult was 2.0 and is 3.0"],
    ),
    "step size and gamma": (
        {"param_scheduler.1.step_size": 2, "param_scheduler.1.gamma": 0.1},
        ["param_scheduler.1.step_size was 1 and is 2", "param_scheduler.1.gamma was 0.5 and is 0.1"],
    ),
    "a factor": ({"param_scheduler.0.end_factor": 0.5}, ["param_scheduler.0.end_factor was 1.0 and is 0.5"]),
    "a longer training": (
        {"train_cfg.max_epochs": 6},
        ["param_scheduler.1.end was 4 and is 6", "param_scheduler.2.end was 4 and is 6"],
    ),
    "the growth of the scale": (
        {"optim_wrapper.loss_scale.growth_interval": 3},
        ["optim_wrapper.loss_scale.growth_interval was 100 and is 3"],
    ),
}


class TestWithoutEffect:
    """By default the settings of the file count, as in MMEngine."""

    @pytest.mark.parametrize("name", EDITS)
    def test_one_warning_lists_the_edits(self, name: str, tmp_path: Path, capsys: Any) -> None:
        changes, clauses = EDITS[name]
        train(base(tmp_path))
        before = Runner.from_cfg(base(tmp_path, resume=True, load_from=tmp_path / "iter_8.pth"))
        before.load_or_resume()
        assert warned(capsys) == [], "nothing was edited"
        cfg = edited(base(tmp_path, resume=True, load_from=str(tmp_path / "iter_8.pth")), changes)
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
        (line,) = warned(capsys)
        assert [clause for clause in clauses if clause not in line] == []
        assert line.count(" was ") == len(clauses) + 2 and "resume_overrides=True (--resume-overrides)" in line
        assert_same(runner.optim_wrapper.state_dict(), before.optim_wrapper.state_dict())
        for one, other in zip(runner.param_schedulers, before.param_schedulers, strict=True):
            assert_same(one.state_dict(), other.state_dict())

    @pytest.mark.parametrize(
        "changes",
        [
            {"optim_wrapper.clip_grad": dict(max_norm=1.0)},
            {"optim_wrapper.optimizer.type": "AdamW"},
            {"optim_wrapper.optimizer.eps": 1e-8},  # the default
            {"param_scheduler.1.by_epoch": True, "param_scheduler.1.end": 4},  # what it is anyway
            {"optim_wrapper.dtype": "float16"},
        ],
    )
    def test_what_counts_or_is_the_same_is_not_listed(self, changes: Any, tmp_path: Path, capsys: Any) -> None:
        train(base(tmp_path))
        Runner.from_cfg(edited(base(tmp_path, resume=True), changes)).load_or_resume()
        assert warned(capsys) == []

    def test_all_schedulers_removed(self, tmp_path: Path, capsys: Any) -> None:
        train(base(tmp_path))
        Runner.from_cfg(base(tmp_path, resume=True, param_scheduler=None)).load_or_resume()
        (line,) = warned(capsys)
        assert "param_scheduler.0 was 'LinearLR' and is 'none'; param_scheduler.1 was 'StepLR' and is 'none'" in line

    def test_one_of_them_removed_is_refused(self, tmp_path: Path) -> None:
        train(base(tmp_path))
        fewer = base(tmp_path)["param_scheduler"][:1]
        with pytest.raises(CheckpointError, match="has 3 schedulers instead of 1; with resume_overrides=True"):
            Runner.from_cfg(base(tmp_path, resume=True, param_scheduler=fewer)).load_or_resume()

    def test_files_of_the_resumed_training_tell_what_is_in_effect(self, tmp_path: Path, capsys: Any) -> None:
        train(base(tmp_path))
        new = edited(base(tmp_path, resume=True), {"optim_wrapper.optimizer.lr": 0.02})
        train({**new, "load_from": str(tmp_path / "iter_8.pth")})
        capsys.readouterr()
        Runner.from_cfg(new).load_or_resume()
        (line,) = warned(capsys)
        assert "optim_wrapper.optimizer.lr was 0.01 and is 0.02" in line
        Runner.from_cfg(base(tmp_path, resume=True)).load_or_resume()
        assert warned(capsys) == []
        train({**new, "load_from": str(tmp_path / "iter_8.pth"), "resume_overrides": True})
        Runner.from_cfg(new).load_or_resume()
        assert warned(capsys) == [], "there it counts"

    def test_several_optimizers(self, tmp_path: Path, capsys: Any) -> None:
        def cfg(lr: float, gamma: float, **changes: Any) -> dict[str, Any]:
            wrapper = dict(
                constructor="MultiOptimWrapperConstructor",
                backbone=dict(optimizer=dict(type="FusedSGD", lr=0.1)),
                head=dict(optimizer=dict(type="FusedSGD", lr=lr)),
            )
            schedulers = dict(backbone=dict(type="StepLR", step_size=1, gamma=gamma), head=[])
            from engine_cases import PointNet

            class Both(PointNet):
                def train_step(self, data, optim_wrapper):
                    loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
                    for wrapper in optim_wrapper.values():
                        wrapper.zero_grad()
                    loss.backward()
                    for wrapper in optim_wrapper.values():
                        wrapper.step()
                    return {"loss": loss.detach()}

            return config(
                tmp_path, validates=False, model=Both(), optim_wrapper=wrapper, param_scheduler=schedulers, **changes
            )

        train(cfg(0.1, 0.5))
        Runner.from_cfg(cfg(0.2, 0.25, resume=True)).load_or_resume()
        (line,) = warned(capsys)
        assert "optim_wrapper.head.optimizer.lr was 0.1 and is 0.2" in line
        assert "param_scheduler.backbone.0.gamma was 0.5 and is 0.25" in line
        runner = Runner.from_cfg(cfg(0.2, 0.25, resume=True, resume_overrides=True))
        runner.load_or_resume()
        assert runner.optim_wrapper.get_lr() == {"backbone.lr": [0.1 * 0.25**3], "head.lr": [0.2]}

    def test_wrappers_and_schedulers_that_are_no_configs(self, tmp_path: Path, capsys: Any) -> None:
        def cfg(lr: float, step_size: int, **changes: Any) -> dict[str, Any]:
            from engine_cases import PointNet

            model = PointNet()
            wrapper = OptimWrapper(fusedopt.FusedAdamW(model.parameters(), lr=lr))
            scheduler = StepLR(wrapper, step_size=step_size)
            return config(
                tmp_path, validates=False, model=model, optim_wrapper=wrapper, param_scheduler=[scheduler], **changes
            )

        train(cfg(0.1, 2))
        Runner.from_cfg(cfg(0.2, 3, resume=True)).load_or_resume()
        (line,) = warned(capsys)
        assert "optim_wrapper.param_groups.0.lr was 0.1 and is 0.2" in line
        assert "param_scheduler.0.step_size was 2 and is 3" in line

    def test_a_file_from_before_tells_by_its_config(self, tmp_path: Path, capsys: Any) -> None:
        cfg = Config({**base(tmp_path)}, filename="training.py")
        Runner.from_cfg(cfg).train()
        path = tmp_path / "iter_8.pth"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["meta"]["settings"]
        torch.save(checkpoint, path)
        changes = {"optim_wrapper.optimizer.lr": 0.02, "resume": True, "load_from": str(path)}
        cfg.merge_from_dict(changes)
        Runner.from_cfg(cfg).load_or_resume()
        (line,) = warned(capsys)
        assert "optim_wrapper.optimizer.lr was 0.01 and is 0.02" in line and line.count(" was ") == 3
        checkpoint["meta"]["cfg"] = "model = dict(type=print('run'))"
        torch.save(checkpoint, path)
        Runner.from_cfg(cfg).load_or_resume()
        assert capsys.readouterr().out == "", "nothing can be told, and no code was run"


class TestOverrides:
    """With ``resume_overrides`` the training goes on as if the config had been the edited one all along."""

    def assert_as_all_along(self, cfg: dict[str, Any], changes: dict[str, Any], tmp_path: Path, file: str) -> Runner:
        train({**cfg, "work_dir": str(tmp_path / "first")})
        new = edited(cfg, changes)
        all_along, watch = Watch(), Watch()
        straight = train({**new, "work_dir": str(tmp_path / "straight")}, all_along)
        more = dict(resume=True, load_from=str(tmp_path / "first" / file), resume_overrides=True)
        resumed = train({**new, "work_dir": str(tmp_path / "second"), **more}, watch)
        assert 0 < len(watch.seen) < len(all_along.seen)
        assert_same(watch.seen, {step: all_along.seen[step] for step in watch.seen})
        for one, other in zip(resumed.param_schedulers or [], straight.param_schedulers or [], strict=True):
            assert_same(one.state_dict(), other.state_dict())
        return resumed

    @pytest.mark.parametrize("name", EDITS)
    @pytest.mark.parametrize("file", ["iter_8.pth", "iter_16.pth"])
    def test_the_settings_are_those_of_the_config(self, name: str, file: str, tmp_path: Path) -> None:
        resumed = self.assert_as_all_along(base(tmp_path), EDITS[name][0], tmp_path, file)
        scaler = resumed.optim_wrapper.loss_scaler
        assert scaler.get_growth_interval() == (3 if "growth" in name else 100)

    @pytest.mark.parametrize(
        "schedulers",
        [
            [],
            [dict(type="StepLR", step_size=2, gamma=0.5)],
            [*base(Path())["param_scheduler"], dict(type="ExponentialLR", gamma=0.9)],
            [dict(type="CyclicLR", base_lr=0.001, max_lr=0.02, step_size_up=3, by_epoch=False, cycle_momentum=False)],
        ],
        ids=["none", "fewer", "more", "others"],
    )
    def test_other_schedulers(self, schedulers: Any, tmp_path: Path) -> None:
        self.assert_as_all_along(base(tmp_path), {"param_scheduler": schedulers}, tmp_path, "iter_8.pth")

    def test_training_by_iterations(self, tmp_path: Path) -> None:
        cfg = config(tmp_path, validates=False, **by_iterations())
        changes = {"param_scheduler.1.power": 2.0, "optim_wrapper.optimizer.lr": 0.5}
        self.assert_as_all_along(cfg, changes, tmp_path, "iter_10.pth")

    def test_the_state_is_that_of_the_file(self, tmp_path: Path) -> None:
        train(base(tmp_path))
        more = dict(resume=True, load_from=str(tmp_path / "iter_8.pth"))
        plain = Runner.from_cfg(base(tmp_path, **more))
        plain.load_or_resume()
        changed = edited(base(tmp_path, **more, resume_overrides=True), {"optim_wrapper.optimizer.lr": 0.5})
        runner = Runner.from_cfg(changed)
        runner.load_or_resume()
        one, other = (each.optim_wrapper.optimizer.state_dict()["state"] for each in (runner, plain))
        assert_same(one, other)
        assert len(one) > 0

    def test_without_an_edit_it_is_the_uninterrupted_training(self, tmp_path: Path) -> None:
        straight = train(base(tmp_path / "a"))
        more = dict(resume=True, load_from=str(tmp_path / "a" / "iter_8.pth"), resume_overrides=True)
        resumed = train(base(tmp_path / "b", **more))
        assert len(recorded(resumed).losses) == 12
        assert_same(state_of(resumed), state_of(straight))

    def test_tensors(self, tmp_path: Path) -> None:
        """As for captured CUDA graphs."""

        def wrapper(lr: float, model: torch.nn.Module) -> OptimWrapper:
            return OptimWrapper(fusedopt.FusedAdamW(model.parameters(), lr=torch.tensor(lr)))

        from engine_cases import PointNet

        def cfg(lr: float, **changes: Any) -> dict[str, Any]:
            model = PointNet()
            schedulers = [dict(type="StepLR", step_size=1, gamma=0.5)]
            return config(
                tmp_path,
                validates=False,
                model=model,
                optim_wrapper=wrapper(lr, model),
                param_scheduler=schedulers,
                **changes,
            )

        train(cfg(0.1))
        more = dict(resume=True, load_from=tmp_path / "epoch_2.pth", resume_overrides=True)
        runner = Runner.from_cfg(cfg(0.8, **more))
        runner.load_or_resume()
        (lr,) = runner.optim_wrapper.get_lr()["lr"]
        assert isinstance(lr, torch.Tensor) and float(lr) == pytest.approx(0.2)

    def test_metrics_so_far_are_not_known(self, tmp_path: Path) -> None:
        entry = dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0, factor=0.5)
        cfg = config(tmp_path, param_scheduler=[entry])
        train(cfg)
        changed = edited({**cfg, "resume": True, "resume_overrides": True}, {"optim_wrapper.optimizer.lr": 0.5})
        runner = Runner.from_cfg(changed)
        before = state_of(runner)
        message = r"what param_scheduler\.0 \(ReduceOnPlateauLR\) has done depends on the metrics so far"
        with pytest.raises(CheckpointError, match=message):
            runner.load_or_resume()
        assert_same(state_of(runner), before)
        Runner.from_cfg({**cfg, "resume": True, "resume_overrides": True}).load_or_resume()

    def test_a_refusal_later_on_puts_all_back(self, tmp_path: Path) -> None:
        class Picky(Hook):
            def after_load_checkpoint(self, runner, checkpoint):
                raise ValueError("not this one")

        train(base(tmp_path))
        changed = edited(base(tmp_path, resume=True, resume_overrides=True), {"optim_wrapper.optimizer.lr": 0.5})
        runner = Runner.from_cfg({**changed, "custom_hooks": [Picky()]})
        before = state_of(runner)
        with pytest.raises(CheckpointError, match="not this one"):
            runner.load_or_resume()
        assert_same({**state_of(runner), "random": 0}, {**before, "random": 0})

    def test_it_is_true_or_false(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="resume_overrides must be True or False, got 'lr'"):
            Runner.from_cfg(base(tmp_path, resume_overrides="lr"))


CONFIG = """
model = dict(type="PointNet")
train_dataloader = dict(
    dataset=dict(type="Points", size=16), batch_size=8, collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True))
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type="FusedSGD", lr=0.1))
param_scheduler = dict(type="StepLR", step_size=1, gamma=0.5)
"""


def test_on_the_command_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "training.py"
    path.write_text(CONFIG)
    command = ["train", str(path), "--work-dir", str(tmp_path / "runs")]
    assert main(command) == 0
    capsys.readouterr()
    more = ["--resume", str(tmp_path / "runs" / "epoch_1.pth"), "--cfg-options", "optim_wrapper.optimizer.lr=0.4"]
    assert main([*command, *more]) == 0
    assert "optim_wrapper.optimizer.lr was 0.1 and is 0.4" in capsys.readouterr().out
    group = torch.load(tmp_path / "runs" / "epoch_2.pth", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["lr"] == 0.05
    assert main([*command, *more, "--resume-overrides"]) == 0
    assert "the settings of the config apply" in capsys.readouterr().out
    group = torch.load(tmp_path / "runs" / "epoch_2.pth", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["lr"] == 0.2
    assert main([*command, "--resume-overrides"]) == 2
    assert "--resume-overrides: there is nothing to resume; give --resume too" in capsys.readouterr().err


def test_functions_are_compared_by_name() -> None:
    settings = scheduler_settings([dict(type="LambdaLR", lr_lambda=re.compile)], 3, 9)
    assert settings["param_scheduler.0.lr_lambda"] == "re.compile"
    assert differing(settings, scheduler_settings([dict(type="LambdaLR", lr_lambda=re.compile)], 3, 9)) == {}
    assert differing({}, optimizer_settings(dict(optimizer=dict(type="FusedSGD", lr=0.1))))
