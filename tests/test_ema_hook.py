"""EMAHook: MMEngine's numbers at every stage, resuming bit for bit, and what may go wrong."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fusedopt.training.averaging import ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage
from fusedopt.training.engine import BaseMetric, BaseModel, CheckpointError, EMAHook, Hook, Runner
from fusedopt.training.registry import HOOKS


class Net(BaseModel):
    """Predicts its own first weight, so that a metric sees which weights it is evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, mode: str = "tensor") -> Any:
        if mode == "predict":
            return [self.fc.weight[0, 0].clone()] * len(x)
        return {"loss": (self.head(self.norm(self.fc(x))) - x.sum(1, keepdim=True)).square().mean()}


class FirstWeight(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(data_samples[0].item())

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"first_weight": results[-1]}


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(3, generator=torch.Generator().manual_seed(index))}


class Probe(Hook):
    """Notes the first weight of the model after each iteration, and the metrics of each validation."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.metrics: list[float] = []

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        self.weights.append(runner.bare_model.fc.weight[0, 0].item())

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        self.metrics.append(metrics["first_weight"])


def make_runner(work_dir: Path, *hooks: Any, epochs: int = 4, **settings: Any) -> Runner:
    """Three iterations an epoch, a validation and a checkpoint after each."""
    loader = {"batch_size": 4, "dataset": Data(), "collate_fn": {"type": "default_collate"}}
    evaluation = {"sampler": {"type": "DefaultSampler", "shuffle": False}, **loader}
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(
        model=Net(),
        work_dir=work_dir,
        train_dataloader=loader,
        val_dataloader=evaluation,
        test_dataloader=evaluation,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg={},
        test_cfg={},
        val_evaluator=FirstWeight(),
        test_evaluator=FirstWeight(),
        optim_wrapper=dict(optimizer=dict(type="FusedAdamW", lr=0.05)),
        custom_hooks=list(hooks),
        env_cfg=dict(device="cpu"),
        randomness=dict(seed=1),
        log_level="WARNING",
    )
    return Runner(**{**arguments, **settings})


def checkpoint_of(work_dir: Path, name: str = "epoch_4.pth") -> dict[str, Any]:
    return torch.load(work_dir / name, weights_only=True)


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class TestAgainstMMEngine:
    @pytest.fixture
    def theirs(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
            from mmengine import hooks
        return hooks.EMAHook

    @staticmethod
    def stand_in(model: nn.Module) -> SimpleNamespace:
        """What either hook asks of a runner."""
        logger = logging.getLogger("stand-in")
        return SimpleNamespace(
            model=model,
            bare_model=model,
            iter=0,
            epoch=0,
            max_iters=12,
            max_epochs=4,
            resumes=False,
            _resume=False,
            logger=logger,
        )

    @staticmethod
    @torch.no_grad()
    def change(models: list[nn.Module]) -> None:
        """The same step of training for all."""
        for tensors in zip(*([*model.parameters(), *model.buffers()] for model in models), strict=True):
            noise = torch.randn(tensors[0].shape)
            for tensor in tensors:
                if tensor.is_floating_point():
                    tensor.mul_(0.9).add_(noise)
                else:
                    tensor.add_(1)

    @pytest.mark.parametrize("begin", [{}, {"begin_iter": 5}, {"begin_epoch": 3}])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"momentum": 0.1, "interval": 2},
            {"momentum": 0.1, "update_buffers": True},
            {"ema_type": "MomentumAnnealingEMA", "gamma": 4},
        ],
        ids=lambda settings: ",".join(settings),
    )
    def test_the_same_weights_at_every_stage(self, theirs, begin, settings):
        models = [Net(), Net()]
        models[1].load_state_dict(models[0].state_dict())
        hooks = [EMAHook(**begin, **settings), theirs(**begin, **settings)]
        runners = [self.stand_in(model) for model in models]

        def compare() -> None:
            own = [model.state_dict() for model in models]
            if settings.get("update_buffers"):  # MMEngine leaves counts as they were at the first update
                own = [{name: value for name, value in each.items() if "num_batches" not in name} for each in own]
            assert_same(*own)

        def call(stage: str, *arguments: Any) -> None:
            for hook, runner in zip(hooks, runners, strict=True):
                getattr(hook, stage)(runner, *arguments)
            compare()

        call("before_run")
        call("before_train")
        for epoch in range(4):
            for batch in range(3):
                self.change(models)
                call("after_train_iter", batch)
                for runner in runners:
                    runner.iter += 1
            checkpoints = [{"state_dict": copy.deepcopy(model.state_dict())} for model in models]
            for hook, runner, checkpoint in zip(hooks, runners, checkpoints, strict=True):
                hook.before_save_checkpoint(runner, checkpoint)
            for part in ("state_dict", "ema_state_dict"):
                mine, other = ({**checkpoint[part]} for checkpoint in checkpoints)
                if settings.get("update_buffers") and part == "state_dict":
                    mine.pop("norm.num_batches_tracked")
                    other.pop("norm.num_batches_tracked")
                assert_same(mine, other)
            for stage in ("val", "test"):
                call(f"before_{stage}_epoch")
                call(f"after_{stage}_epoch")
            for runner in runners:
                runner.epoch = epoch + 1
        assert int(hooks[0].ema_model.steps) == {"begin_iter": 8, "begin_epoch": 6}.get(next(iter(begin), ""), 12)

    def test_either_resumes_from_the_others_checkpoint(self, theirs):
        source = Net()
        for kind, other in ((EMAHook, theirs), (theirs, EMAHook)):
            writer, runner = kind(momentum=0.1), self.stand_in(source)
            writer.before_run(runner)
            for batch in range(3):
                self.change([source])
                writer.after_train_iter(runner, batch)
            checkpoint = {"state_dict": copy.deepcopy(source.state_dict())}
            writer.before_save_checkpoint(runner, checkpoint)
            model = Net()
            reader, runner = other(momentum=0.1), self.stand_in(model)
            runner.resumes = runner._resume = True
            reader.before_run(runner)
            reader.after_load_checkpoint(runner, checkpoint)
            assert_same(checkpoint["state_dict"], source.state_dict())
            assert_same(reader.ema_model.state_dict(), writer.ema_model.state_dict())

    def test_its_hook_drives_our_average(self, theirs):
        models = [Net(), Net()]
        models[1].load_state_dict(models[0].state_dict())
        names = ["fusedopt.training.averaging.ExponentialMovingAverage", "ExponentialMovingAverage"]
        hooks = [theirs(ema_type=name, momentum=0.1, begin_iter=2) for name in names]
        runners = [self.stand_in(model) for model in models]
        for hook, runner in zip(hooks, runners, strict=True):
            hook.before_run(runner)
        for number in range(5):
            self.change(models)
            for hook, runner in zip(hooks, runners, strict=True):
                runner.iter = number
                hook.after_train_iter(runner, number)
                hook.before_val_epoch(runner)
            assert_same(*(model.state_dict() for model in models))
            for hook, runner in zip(hooks, runners, strict=True):
                hook.after_val_epoch(runner)
        assert_same(*(hook.ema_model.state_dict() for hook in hooks))
        assert type(hooks[0].ema_model) is ExponentialMovingAverage


class TestTraining:
    def test_it_is_evaluated_with_the_average_and_trained_without(self, tmp_path):
        plain, watched = Probe(), Probe()
        make_runner(tmp_path / "plain", plain).train()
        hook = EMAHook(momentum=0.25)
        runner = make_runner(tmp_path / "ema", hook, watched)
        runner.train()
        assert watched.weights == plain.weights
        average, averages = watched.weights[0], []
        for weight in watched.weights:
            average = torch.lerp(torch.tensor(average), torch.tensor(weight), 0.25).item()
            averages.append(average)
        assert watched.metrics == averages[2::3]
        assert plain.metrics == plain.weights[2::3]
        assert runner.test() == {"first_weight": averages[-1]}
        assert runner.bare_model.fc.weight[0, 0].item() == watched.weights[-1]

    def test_buffers_that_changed_since_the_last_update_are_evaluated_and_saved(self, tmp_path):
        """As those that SyncBuffersHook averages over processes after an epoch."""

        class Sync(Hook):
            def after_train_epoch(self, runner: Any) -> None:
                runner.bare_model.norm.running_mean.fill_(runner.epoch)

            def before_val_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
                assert (runner.bare_model.norm.running_mean == runner.epoch - 1).all()

        make_runner(tmp_path, EMAHook(), Sync()).train()
        assert (checkpoint_of(tmp_path)["state_dict"]["norm.running_mean"] == 3).all()

    def test_a_checkpoint_has_the_average_for_use_and_the_own_weights_beside_it(self, tmp_path):
        hook = EMAHook(momentum=0.25)
        runner = make_runner(tmp_path, hook)
        model = runner.train()
        checkpoint = checkpoint_of(tmp_path)
        assert_same(checkpoint["state_dict"], hook.ema_model.module.state_dict())
        own = checkpoint["ema_state_dict"]
        assert own.pop("steps") == 12
        assert_same({name.removeprefix("module."): value for name, value in own.items()}, model.state_dict())

    @pytest.mark.parametrize(
        "settings",
        [
            {"momentum": 0.1},
            {"momentum": 0.1, "interval": 2, "update_buffers": True},
            {"ema_type": "MomentumAnnealingEMA", "gamma": 3},
            {"ema_type": "StochasticWeightAverage", "begin_epoch": 3},
            {"begin_iter": 5, "dtype": "float64"},
        ],
        ids=lambda settings: ",".join(settings),
    )
    @pytest.mark.parametrize("by_iterations", [False, True])
    def test_it_is_resumed_bit_for_bit(self, tmp_path, settings, by_iterations):
        def make(name: str, **more: Any) -> tuple[Runner, EMAHook, Probe]:
            hook, probe = EMAHook(**settings), Probe()
            if by_iterations:
                more["train_cfg"] = dict(by_epoch=False, max_iters=12, val_interval=3)
                more["default_hooks"] = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4))
            return make_runner(tmp_path / name, hook, probe, **more), hook, probe

        whole, expected, all_metrics = make("whole")
        whole.train()
        newest = "iter_4.pth" if by_iterations else "epoch_2.pth"
        resumed, hook, metrics = make("resumed", load_from=tmp_path / "whole" / newest, resume=True)
        resumed.train()
        assert_same(resumed.bare_model.state_dict(), whole.bare_model.state_dict())
        assert_same(hook.ema_model.state_dict(), expected.ema_model.state_dict())
        # After iterations 6, 9 and 12; after epochs 2, whose validation was due still, 3 and 4.
        assert metrics.metrics == all_metrics.metrics[1:]

    def test_before_the_beginning_the_average_is_the_model(self, tmp_path):
        probe, hook = Probe(), EMAHook(begin_epoch=3, momentum=0.1)
        make_runner(tmp_path, hook, probe).train()
        assert probe.metrics[:2] == probe.weights[2:6:3]
        assert probe.metrics[2] != probe.weights[8]
        early = checkpoint_of(tmp_path, "epoch_2.pth")
        assert early["ema_state_dict"]["steps"] == 0
        assert torch.equal(early["state_dict"]["fc.weight"], early["ema_state_dict"]["module.fc.weight"])

    def test_the_average_of_one_run_is_that_of_the_next_and_of_no_other_model(self, tmp_path):
        hook = EMAHook(momentum=0.1)
        runner = make_runner(tmp_path, hook)
        runner.train()
        average = hook.ema_model
        runner.test()
        assert hook.ema_model is average
        make_runner(tmp_path / "other", hook).test()
        assert hook.ema_model is not average

    def test_a_low_precision_model_and_its_float32_average(self, tmp_path):
        hook = EMAHook(momentum=0.1, dtype="float32")
        settings: dict[str, Any] = dict(model=nn.Module.bfloat16(Net()))
        samples = [{"x": each["x"].bfloat16()} for each in map(Data().__getitem__, range(12))]
        data = {"batch_size": 4, "dataset": samples, "collate_fn": {"type": "default_collate"}}
        for name in ("train", "val", "test"):
            settings[f"{name}_dataloader"] = data
        runner = make_runner(tmp_path, hook, **settings)
        model = runner.train()
        checkpoint = checkpoint_of(tmp_path)
        assert checkpoint["state_dict"]["fc.weight"].dtype == torch.float32
        assert checkpoint["ema_state_dict"]["module.fc.weight"].dtype == torch.bfloat16
        settings["model"] = nn.Module.bfloat16(Net())
        again, before = EMAHook(momentum=0.1, dtype="float32"), hook.ema_model.state_dict()
        runner = make_runner(tmp_path, again, resume=True, **settings)
        runner.train()
        assert_same(again.ema_model.state_dict(), before)
        assert_same(runner.bare_model.state_dict(), model.state_dict())


class TestLoading:
    @pytest.fixture
    def trained(self, tmp_path: Path) -> Path:
        """A work_dir with checkpoints of a training with the hook."""
        make_runner(tmp_path / "trained", EMAHook(momentum=0.1)).train()
        return tmp_path / "trained"

    @pytest.fixture
    def without(self, tmp_path: Path) -> Path:
        """One of a training without it."""
        make_runner(tmp_path / "without").train()
        return tmp_path / "without"

    def test_load_from_takes_the_average_as_the_model(self, tmp_path, trained):
        for hooks in ([], [EMAHook(momentum=0.1)]):
            runner = make_runner(tmp_path / "new", *hooks, load_from=trained / "epoch_4.pth")
            assert runner.test() == {"first_weight": checkpoint_of(trained)["state_dict"]["fc.weight"][0, 0].item()}
            assert_same(runner.bare_model.state_dict(), checkpoint_of(trained)["state_dict"])

    def test_what_is_loaded_begins_a_new_average(self, tmp_path, trained):
        hook, probe = EMAHook(momentum=0.5), Probe()
        runner = make_runner(tmp_path / "new", hook, probe, epochs=1, load_from=trained / "epoch_4.pth")
        runner.train()
        average = torch.tensor(probe.weights[0])
        for weight in probe.weights[1:]:
            average = torch.lerp(average, torch.tensor(weight), 0.5)
        assert probe.metrics == [average.item()]
        runner.load_checkpoint(trained / "epoch_1.pth")
        expected = checkpoint_of(trained, "epoch_1.pth")["state_dict"]["fc.weight"][0, 0].item()
        assert runner.test() == {"first_weight": expected}

    def test_a_checkpoint_without_an_average_is_loaded_and_resumed(self, tmp_path, without, capsys):
        weights = checkpoint_of(without)["state_dict"]
        runner = make_runner(tmp_path / "new", EMAHook(), load_from=without / "epoch_4.pth")
        runner.test()
        assert_same(runner.bare_model.state_dict(), weights)
        assert "ema_state_dict" not in capsys.readouterr().out
        hook = EMAHook()
        runner = make_runner(without, hook, epochs=5, resume=True)
        runner.train()
        assert "the checkpoint has no ema_state_dict; a new average begins" in capsys.readouterr().out
        assert hook.ema_model.steps == 3

    def test_a_checkpoint_with_an_average_is_resumed_without_the_hook(self, tmp_path, trained):
        """The average goes on as the model: that is what its state_dict has."""
        runner = make_runner(trained, epochs=5, resume=True)
        runner.train()
        assert runner.epoch == 5

    def test_an_average_that_is_not_that_of_the_model_is_refused(self, tmp_path, trained):
        checkpoint = checkpoint_of(trained)
        del checkpoint["ema_state_dict"]["module.fc.bias"]
        torch.save(checkpoint, tmp_path / "part.pth")
        runner = make_runner(tmp_path / "new", EMAHook(), load_from=tmp_path / "part.pth", resume=True)
        before = copy.deepcopy(runner.bare_model.state_dict())
        with pytest.raises(CheckpointError, match=r"ema_state_dict does not fit the average: it lacks fc[.]bias"):
            runner.train()
        assert_same(runner.bare_model.state_dict(), before)

    def test_resumed_by_a_call_of_resume(self, tmp_path, trained):
        hook = EMAHook(momentum=0.1)
        runner = make_runner(tmp_path / "new", hook)
        runner.resume(trained / "epoch_2.pth")
        checkpoint = checkpoint_of(trained, "epoch_2.pth")
        assert torch.equal(hook.ema_model.module.fc.weight, checkpoint["state_dict"]["fc.weight"])
        assert torch.equal(runner.bare_model.fc.weight, checkpoint["ema_state_dict"]["module.fc.weight"])
        runner.train()
        expected, average = checkpoint_of(trained), hook.ema_model.module
        assert_same(expected["state_dict"], average.state_dict())

    def test_before_any_run(self, tmp_path, trained):
        runner = make_runner(tmp_path / "new", EMAHook(momentum=0.1))
        runner.save_checkpoint(tmp_path, "first.pth")
        assert checkpoint_of(tmp_path, "first.pth")["ema_state_dict"]["steps"] == 0
        runner.load_checkpoint(trained / "epoch_4.pth")
        expected = checkpoint_of(trained)["state_dict"]["fc.weight"][0, 0].item()
        assert runner.val_loop.run() == runner.test() == {"first_weight": expected}

    @pytest.mark.parametrize("strict", [False, True])
    def test_strict_load(self, tmp_path, trained, strict, capsys):
        checkpoint = checkpoint_of(trained)
        checkpoint["ema_state_dict"]["calls"] = checkpoint["ema_state_dict"].pop("steps")
        torch.save(checkpoint, tmp_path / "other.pth")
        hook = EMAHook(strict_load=strict)
        runner = make_runner(tmp_path / "new", hook, load_from=tmp_path / "other.pth", resume=True)
        message = "it lacks steps; it has calls, which the model does not have"
        if strict:
            with pytest.raises(CheckpointError, match=message):
                runner.train()
        else:
            runner.train()
            assert message in capsys.readouterr().out

    @pytest.mark.parametrize("strict", [False, True])
    def test_strict_load_of_weights_alone(self, tmp_path, strict):
        torch.save({"fc.bias": torch.ones(4)}, tmp_path / "bias.pth")
        hook = EMAHook(strict_load=strict)
        runner = make_runner(tmp_path / "new", hook, load_from=tmp_path / "bias.pth")
        if strict:
            with pytest.raises(CheckpointError, match=r"state_dict does not fit the average: it lacks fc[.]weight"):
                runner.test()
        else:
            runner.test()
            assert torch.equal(hook.ema_model.module.fc.bias, torch.ones(4))


class TestWhatGoesWrong:
    class Failing(Hook):
        """Fails in the second validation."""

        validations = 0

        def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if batch_idx == 0:
                self.validations += 1
            if self.validations == 2 and batch_idx == 1:
                raise KeyboardInterrupt

    def test_after_a_failed_evaluation_the_model_has_its_own_weights(self, tmp_path):
        probe = Probe()
        runner = make_runner(tmp_path, EMAHook(momentum=0.1), probe, self.Failing())
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        assert runner.bare_model.fc.weight[0, 0].item() == probe.weights[-1]

    def test_one_that_someone_caught(self, tmp_path):
        class Patient(Hook):
            priority = "LOWEST"

            def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
                if runner.iter in (0, 1):
                    try:
                        runner.val_loop.run()
                    except KeyboardInterrupt:
                        assert runner.bare_model.fc.weight[0, 0].item() != watched.weights[-1]
                    runner.model.train()

        plain, watched = Probe(), Probe()
        make_runner(tmp_path / "plain", plain).train()
        make_runner(tmp_path / "ema", EMAHook(momentum=0.1), watched, self.Failing(), Patient()).train()
        assert watched.weights == plain.weights

    def test_a_checkpoint_in_the_middle_of_an_evaluation(self, tmp_path):
        class Early(Hook):
            def after_val_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
                runner.save_checkpoint(tmp_path, "early.pth")

        runner = make_runner(tmp_path, EMAHook(), Early())
        with pytest.raises(RuntimeError, match=r"no checkpoint can be saved.*whose priority is NORMAL"):
            runner.train()
        assert not (tmp_path / "early.pth").exists()

    def test_the_best_checkpoint_is_saved_after_the_evaluation(self, tmp_path):
        saving = dict(type="CheckpointHook", save_best="first_weight", rule="greater")
        probe = Probe()
        make_runner(tmp_path, EMAHook(momentum=0.1), probe, default_hooks=dict(checkpoint=saving)).train()
        (best,) = tmp_path.glob("best_*.pth")
        weight = checkpoint_of(tmp_path, best.name)["state_dict"]["fc.weight"][0, 0].item()
        assert weight == max(probe.metrics)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"begin_iter": 13}, "begin_iter=13 is past the end of the training, which is 12: nothing is averaged"),
            ({"start_iters": 500}, "begin_iter=500 is past the end of the training, which is 12"),
            ({"begin_epoch": 5}, "begin_epoch=5 is past the end of the training, which is 4"),
        ],
    )
    def test_a_beginning_past_the_end_is_a_warning(self, tmp_path, arguments, message, capsys):
        hook = EMAHook(**arguments)
        make_runner(tmp_path, hook).train()
        assert message in capsys.readouterr().out
        assert hook.ema_model.steps == 0

    def test_one_at_the_end_is_none(self, tmp_path, capsys):
        hook = EMAHook(begin_iter=12)
        make_runner(tmp_path, hook).train()
        assert "EMAHook" not in capsys.readouterr().out
        assert hook.ema_model.steps == 1

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (dict(begin_iter=3, begin_epoch=1), ValueError, "begin_iter=3 and begin_epoch=1 are given"),
            (dict(begin_iter=3, start_iters=3), ValueError, "begin_iter=3 and start_iters=3 are given"),
            (dict(start_iters=3, begin_epoch=2), ValueError, "begin_epoch=2 and start_iters=3 are given"),
            (dict(begin_iter=-1), ValueError, "Invalid begin_iter: -1; expected an int of at least 0"),
            (dict(begin_epoch=1.5), TypeError, "begin_epoch must be an int, got 1.5"),
            (dict(start_iters="500"), TypeError, "start_iters must be an int, got '500'"),
            (dict(strict_load=1), TypeError, "strict_load must be True or False, got 1"),
            (dict(ema_type="ExponentialAverage"), KeyError, "did you mean 'ExponentialMovingAverage'?"),
            (dict(ema_type="torch.nn.Linear"), TypeError, "ema_type must be a BaseAveragedModel, got Linear"),
            (dict(begin_iters=3), TypeError, "EMAHook has no argument 'begin_iters'; did you mean 'begin_iter'?"),
            (dict(gama=3, ema_type="MomentumAnnealingEMA"), TypeError, "no argument 'gama'; did you mean 'gamma'?"),
            (dict(model=nn.Linear(1, 1)), TypeError, "EMAHook has no argument 'model'"),
            (dict(momentum=1.5), ValueError, "Invalid momentum: 1.5"),
            (dict(interval=0), ValueError, "Invalid interval: 0"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            EMAHook(**arguments)


def test_custom_hooks_as_documented(tmp_path, capsys):
    custom_hooks = [dict(type="EMAHook", start_iters=500, priority="NORMAL")]
    runner = make_runner(tmp_path, *custom_hooks)
    (hook,) = (each for each in runner.hooks if isinstance(each, EMAHook))
    assert (hook.begin_iter, hook.priority) == (500, "NORMAL")
    runner.train()
    assert "past the end" in capsys.readouterr().out


def test_registered_with_each_average():
    for cls in (ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage):
        for name in (cls.__name__, cls, f"fusedopt.training.averaging.{cls.__name__}"):
            hook = HOOKS.build(dict(type="EMAHook", ema_type=name, interval=2))
            hook.before_run(SimpleNamespace(bare_model=nn.Linear(2, 2)))
            assert type(hook.ema_model) is cls and hook.ema_model.interval == 2
