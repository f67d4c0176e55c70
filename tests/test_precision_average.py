"""The average of the weights that an optimizer keeps: read, put in the place of the weights, and used by EMAHook."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import bits, module, set_gradients
from test_ema_hook import Data, Net, Probe, assert_same, checkpoint_of, make_runner
from torch import Tensor, nn

import fusedopt
from fusedopt.optimizers.averages import keep_average
from fusedopt.optimizers.conversion import CODES_SHAPE
from fusedopt.rules import Average
from fusedopt.training.engine import CheckpointError, EMAHook

BF16 = torch.bfloat16
BACKENDS = ["reference", *(["native"] if module is not None else [])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
MASTERS = [None, "float32", "split", "split8"]


def made(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(70,), (3, 5), (), (2, 9)]]


def step(params: list[nn.Parameter], optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        set_gradients(params, seed)
        optimizer.step()


def everything(params: list[nn.Parameter], optimizer: Any) -> list[Any]:
    state = [optimizer.state[param] for param in params]
    return [bits(params), *(bits(value for value in each.values() if isinstance(value, Tensor)) for each in state)]


class TestAveraged:
    @each_backend
    @pytest.mark.parametrize("master", MASTERS)
    def test_nothing_of_the_training_changes(self, master: Any, backend: str) -> None:
        kept = dict(lr=0.05, master=master, stochastic_rounding=master in (None, "split8"), ema={"decay": 0.9})
        params, others = made(BF16), made(BF16)
        watched, plain = (fusedopt.FusedAdamW(each, **kept, backend=backend) for each in (params, others))
        for seed in range(4):
            step(params, watched, seed)
            step(others, plain, seed)
            before = everything(params, watched)
            with watched.averaged() as averages:
                assert bits(params) == bits([averages[param].to(BF16) for param in params])
                assert all(averages[param] is watched.state[param]["ema"] for param in params)
            assert everything(params, watched) == before
            with contextlib.suppress(ZeroDivisionError), watched.averaged():
                raise ZeroDivisionError
            assert everything(params, watched) == before
        assert everything(params, watched) == everything(others, plain)

    def test_before_the_first_step_it_is_the_weights(self) -> None:
        params = made()
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        optimizer = fusedopt.FusedAdamW([*params, frozen], lr=0.05, ema={"momentum": 0.1})
        assert all(average.data_ptr() == param.data_ptr() for param, average in optimizer.averages().items())
        with optimizer.averaged():
            assert bits(params) == bits(made())
        set_gradients(params, 0)
        params[0].grad[0] = torch.inf
        optimizer.step(grad_scale=1.0)
        with torch.no_grad():
            params[0].add_(1)
        assert torch.equal(optimizer.averages()[params[0]], params[0]), "a skipped step has not begun it"
        step(params, optimizer, 1)
        with torch.no_grad():
            params[0].add_(1)
        assert torch.equal(optimizer.averages()[params[0]] + 1, params[0])
        assert torch.equal(optimizer.averages()[frozen], frozen)

    def test_inside_the_block_nothing_is_trained_saved_or_loaded(self) -> None:
        params = made(BF16)
        optimizer = fusedopt.FusedAdamW(params, lr=0.05, master="split", ema={"decay": 0.9})
        step(params, optimizer, 0, 1)
        saved, before = copy.deepcopy(optimizer.state_dict()), everything(params, optimizer)
        set_gradients(params, 2)
        with optimizer.averaged():
            for name, call in {
                "step": optimizer.step,
                "state_dict": optimizer.state_dict,
                "master_weights": optimizer.master_weights,
                "load_state_dict": lambda: optimizer.load_state_dict(saved),
                "unfuse": lambda: fusedopt.unfuse(optimizer),
                "averaged": lambda: optimizer.averaged().__enter__(),
            }.items():
                with pytest.raises(RuntimeError, match=rf"{name}\(\) inside of `with optimizer.averaged"):
                    call()
            assert optimizer.averages()[params[0]] is optimizer.state[params[0]]["ema"]
        assert everything(params, optimizer) == before
        optimizer.step()

    @pytest.mark.parametrize("call", [copy.deepcopy, pickle.dumps])
    def test_inside_the_block_nothing_is_copied(self, call: Any) -> None:
        params = made()
        optimizer = fusedopt.FusedAdamW(params, lr=0.05, ema={"decay": 0.9})
        step(params, optimizer, 0, 1)
        with optimizer.averaged(), pytest.raises(RuntimeError, match=r"inside of `with optimizer.averaged"):
            call(optimizer)
        call(optimizer)

    def test_a_model_that_is_cast_inside_gets_its_own_weights_back(self) -> None:
        model = nn.Linear(4, 4, bias=False)
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.1, ema={"decay": 0.9})
        step([model.weight], optimizer, 0, 1, 2)
        own = model.weight.detach().clone()
        for cast, dtype in ((model.bfloat16, BF16), (model.double, torch.float64)):
            with optimizer.averaged():
                cast()
            assert torch.equal(model.weight, own.to(dtype))
            model.float()
            with torch.no_grad():
                model.weight.copy_(own)
        with optimizer.averaged():
            model.weight.data = model.weight.data.clone()
        assert torch.equal(model.weight, own)

    def test_it_is_no_setting_of_a_group(self) -> None:
        for kept in (dict(state_dtype="int8"), dict(ema={"decay": 0.9}), dict(stochastic_rounding=True)):
            with pytest.raises(ValueError, match=f"{next(iter(kept))} is no setting of a parameter group"):
                fusedopt.FusedAdamW([dict(params=made(), **kept)], lr=0.05)
        fusedopt.FusedAdamW([dict(params=made(), state_dtype="int8")], lr=0.05, state_dtype="int8")
        with pytest.raises(ValueError, match=r"ema decay: 0; expected a number in \(0, 1\)"):
            fusedopt.FusedAdamW(made(), ema={"decay": 0})

    def test_a_model_that_is_made_double_goes_on_with_its_average(self) -> None:
        found = []
        for backend in BACKENDS:
            params = made()
            optimizer = fusedopt.FusedAdamW(params, lr=0.05, ema={"decay": 0.9}, backend=backend)
            step(params, optimizer, 0, 1)
            for param in params:
                param.grad = None
                param.data = param.data.double()
            before = optimizer.averages()[params[0]].clone()
            step(params, optimizer, 2)
            average = optimizer.averages()[params[0]]
            torch.testing.assert_close(average, torch.lerp(before, params[0].detach().float(), 0.1))
            found.append(average)
        torch.testing.assert_close(found[0], found[-1], rtol=1e-6, atol=1e-7)

    @each_backend
    def test_momentum_that_is_switched_on(self, backend: str) -> None:
        params, others = made(), made()
        ours = fusedopt.FusedSGD(params, lr=0.1, ema={"decay": 0.75, "begin": 1}, backend=backend)
        theirs = torch.optim.SGD(others, lr=0.1)
        for seed in range(4):
            before = [each.clone() for each in ours.averages().values()]
            for own, optimizer in ((params, ours), (others, theirs)):
                optimizer.param_groups[0]["momentum"] = 0.9 if seed > 1 else 0.0
                step(own, optimizer, seed)
            for mine, other, old in zip(params, others, before, strict=True):
                torch.testing.assert_close(mine, other)
                want = mine.detach() if seed < 2 else torch.lerp(old, mine.detach(), 0.25)
                torch.testing.assert_close(ours.averages()[mine], want)

    def test_without_an_average(self) -> None:
        optimizer = fusedopt.FusedAdamW(made(), lr=0.05)
        for call in (optimizer.averages, optimizer.averaged().__enter__):
            with pytest.raises(RuntimeError, match="FusedAdamW keeps no average; expected one with ema=dict"):
                call()

    @each_backend
    def test_one_that_begins_in_the_middle(self, backend: str) -> None:
        params = made()
        optimizer = fusedopt.FusedAdamW(params, lr=0.05, backend=backend)
        step(params, optimizer, 0, 1)
        keep_average(optimizer, Average(momentum=0.25))
        before = [param.detach().clone() for param in params]
        step(params, optimizer, 2)
        for param, value in zip(params, before, strict=True):
            torch.testing.assert_close(optimizer.averages()[param], torch.lerp(value, param.detach(), 0.25))
        keep_average(optimizer, Average(momentum=0.25))
        with pytest.raises(ValueError, match=r"keeps the average .*0\.25.*; expected .*0\.5"):
            keep_average(optimizer, Average(momentum=0.5))


def assert_close(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """torch's lerp contracts a product and a sum on some processors; a step does on none."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-7)


class TestEMAHook:
    @pytest.mark.parametrize(
        "settings",
        [
            {"momentum": 0.25},
            {"momentum": 0.1, "begin_iter": 5},
            {"momentum": 0.1, "begin_epoch": 3, "interval": 2},
            {"ema_type": "MomentumAnnealingEMA", "gamma": 4},
        ],
        ids=lambda settings: ",".join(settings),
    )
    def test_it_is_that_of_a_model_of_its_own(self, tmp_path: Path, settings: Any) -> None:
        found = []
        for fused in (False, True):
            probe, hook = Probe(), EMAHook(fused=fused, **settings)
            runner = make_runner(tmp_path / str(fused), hook, probe)
            runner.train()
            found.append((probe, [checkpoint_of(tmp_path / str(fused), f"epoch_{n}.pth") for n in (1, 2, 3, 4)]))
            assert (hook.ema_model is None) == fused
        (theirs, expected), (mine, saved) = found
        assert mine.weights == theirs.weights
        assert mine.metrics == pytest.approx(theirs.metrics, rel=1e-6)
        for own, other in zip(saved, expected, strict=True):
            assert_close(own["state_dict"], other["state_dict"])
            assert_same(own["ema_state_dict"], other["ema_state_dict"])

    @pytest.mark.parametrize("dtype", [torch.float32, BF16])
    def test_it_is_resumed_bit_for_bit(self, tmp_path: Path, dtype: torch.dtype) -> None:
        def make(name: str, **more: Any) -> tuple[Any, Probe]:
            probe = Probe()
            kept = {"master": "split", "state_dtype": "int8"} if dtype == BF16 else {}
            samples = [{"x": each["x"].to(dtype)} for each in map(Data().__getitem__, range(12))]
            data = {"batch_size": 4, "dataset": samples, "collate_fn": {"type": "default_collate"}}
            settings: dict[str, Any] = {f"{each}_dataloader": data for each in ("train", "val", "test")}
            settings["optim_wrapper"] = dict(optimizer=dict(type="FusedAdamW", lr=0.05, **kept))
            hook = EMAHook(fused=True, momentum=0.1, begin_iter=2)
            return make_runner(tmp_path / name, hook, probe, model=Net().to(dtype), **settings, **more), probe

        whole, metrics = make("whole")
        whole.train()
        resumed, again = make("resumed", load_from=tmp_path / "whole" / "epoch_2.pth", resume=True)
        resumed.train()
        assert_same(resumed.bare_model.state_dict(), whole.bare_model.state_dict())
        left, right = (each.optim_wrapper.optimizer.state_dict()["state"] for each in (resumed, whole))
        for number in right:
            assert left[number].pop(CODES_SHAPE, None) == right[number].pop(CODES_SHAPE, None)
            assert_same(left[number], right[number])
        assert again.metrics == metrics.metrics[1:]
        assert_same(checkpoint_of(tmp_path / "whole")["state_dict"], checkpoint_of(tmp_path / "resumed")["state_dict"])
        for part in ("state_dict", "ema_state_dict"):
            assert checkpoint_of(tmp_path / "whole")[part][f"{'module.' * (part[0] == 'e')}fc.weight"].dtype == dtype

    @pytest.mark.filterwarnings("ignore:fusedopt. the loaded:UserWarning")
    @pytest.mark.parametrize("first", [True, False])
    def test_either_kind_resumes_from_the_other(self, tmp_path: Path, first: bool) -> None:
        straight = Probe()
        make_runner(tmp_path / "straight", EMAHook(momentum=0.1), straight).train()
        make_runner(tmp_path / "first", EMAHook(momentum=0.1, fused=first), epochs=2).train()
        probe, hook = Probe(), EMAHook(momentum=0.1, fused=not first)
        source = tmp_path / "first" / "epoch_2.pth"
        runner = make_runner(tmp_path / "then", hook, probe, load_from=source, resume=True)
        runner.train()
        assert probe.metrics == pytest.approx(straight.metrics[-len(probe.metrics) :], rel=1e-5)
        assert checkpoint_of(tmp_path / "then")["ema_state_dict"]["steps"] == 12

    @pytest.mark.filterwarnings("ignore:fusedopt. the loaded:UserWarning")
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("begin", [0, 4])
    def test_sgd_goes_on_with_the_average_of_a_model_of_its_own(
        self, tmp_path: Path, momentum: float, begin: int
    ) -> None:
        def run(name: str, fused: bool, probe: Probe, **more: Any) -> None:
            wrapper = dict(optimizer=dict(type="FusedSGD", lr=0.05, momentum=momentum))
            hook = EMAHook(momentum=0.1, begin_iter=begin, fused=fused)
            make_runner(tmp_path / name, hook, probe, optim_wrapper=wrapper, **more).train()

        run("straight", False, straight := Probe())
        run("first", False, Probe(), epochs=2)
        run("then", True, probe := Probe(), load_from=tmp_path / "first" / "epoch_2.pth", resume=True)
        assert probe.metrics == pytest.approx(straight.metrics[-len(probe.metrics) :], rel=1e-5)

    @pytest.mark.filterwarnings("ignore:gradient accumulation with BatchNorm:UserWarning")
    def test_steps_that_are_skipped_or_only_accumulate_leave_it_alone(self, tmp_path: Path) -> None:
        hook = EMAHook(fused=True, momentum=0.1, begin_iter=6)
        wrapper = dict(optimizer=dict(type="FusedAdamW", lr=0.05), accumulative_counts=2)
        runner = make_runner(tmp_path, hook, optim_wrapper=wrapper)
        runner.train()
        assert runner.optim_wrapper.optimizer.ema == {"momentum": 0.1, "begin": 2, "interval": 1}
        assert checkpoint_of(tmp_path)["ema_state_dict"]["steps"] == 4

    def test_what_is_loaded_begins_a_new_average(self, tmp_path: Path) -> None:
        make_runner(tmp_path / "first", EMAHook(fused=True, momentum=0.1)).train()
        hook, probe = EMAHook(fused=True, momentum=0.5), Probe()
        runner = make_runner(tmp_path / "new", hook, probe, epochs=1, load_from=tmp_path / "first" / "epoch_4.pth")
        runner.train()
        average = torch.tensor(probe.weights[0])
        for weight in probe.weights[1:]:
            average = torch.lerp(average, torch.tensor(weight), 0.5)
        assert probe.metrics == pytest.approx([average.item()], rel=1e-6)
        assert runner.test() == {"first_weight": probe.metrics[0]}
        assert runner.bare_model.fc.weight[0, 0].item() == probe.weights[-1]

    def test_an_evaluation_that_fails_gives_the_weights_back(self, tmp_path: Path) -> None:
        class Failing(Probe):
            def before_val_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
                with pytest.raises(RuntimeError, match=r"inside of `with optimizer.averaged"):
                    runner.save_checkpoint(tmp_path, "inside.pth")
                raise ZeroDivisionError

        probe = Failing()
        runner = make_runner(tmp_path, EMAHook(fused=True, momentum=0.1), probe)
        with pytest.raises(ZeroDivisionError):
            runner.train()
        assert runner.bare_model.fc.weight[0, 0].item() == probe.weights[-1]
        runner.optim_wrapper.optimizer.state_dict()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"ema_type": "StochasticWeightAverage"}, "cannot keep StochasticWeightAverage; expected ema_type"),
            ({"update_buffers": True}, "update_buffers=True: a step knows no buffers"),
            ({"device": "cpu"}, "device='cpu': the average is where the parameters are"),
            ({"dtype": "bfloat16"}, "dtype='bfloat16': the average is in float32"),
        ],
    )
    def test_what_a_step_cannot_keep_is_refused(self, settings: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EMAHook(fused=True, **settings)
        EMAHook(fused=False, **settings)

    def test_the_optimizer_must_fit(self, tmp_path: Path) -> None:
        hook = EMAHook(fused=True, momentum=0.1)
        stock = make_runner(tmp_path, hook, optim_wrapper=dict(optimizer=dict(type="torch.optim.SGD", lr=0.1)))
        with pytest.raises(TypeError, match=r"needs a fused optimizer, whose step averages; .* is of class SGD"):
            stock.train()
        kept = dict(type="FusedAdamW", lr=0.1, ema=dict(momentum=0.2))
        other = make_runner(tmp_path / "other", hook, optim_wrapper=dict(optimizer=kept))
        with pytest.raises(ValueError, match=r"EMAHook\(fused=True\): the optimizer keeps the average .*0\.2"):
            other.train()
        same = make_runner(
            tmp_path / "same", EMAHook(fused=True, momentum=0.2), epochs=1, optim_wrapper=dict(optimizer=kept)
        )
        same.train()
        by_iterations = make_runner(
            tmp_path / "iters",
            EMAHook(fused=True, begin_epoch=2),
            train_cfg=dict(by_epoch=False, max_iters=3, val_interval=3),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4)),
        )
        with pytest.raises(ValueError, match="begin_epoch=2 in a training by iterations; expected begin_iter"):
            by_iterations.train()
        with pytest.raises(TypeError, match="fused must be True or False"):
            EMAHook(fused="yes")

    def test_weights_that_are_missing_are_refused(self, tmp_path: Path) -> None:
        make_runner(tmp_path / "first", EMAHook(fused=True, momentum=0.1), epochs=1).train()
        checkpoint = checkpoint_of(tmp_path / "first", "epoch_1.pth")
        del checkpoint["ema_state_dict"]["module.fc.bias"]
        torch.save(checkpoint, tmp_path / "part.pth")
        runner = make_runner(tmp_path / "new", EMAHook(fused=True), load_from=tmp_path / "part.pth", resume=True)
        with pytest.raises(CheckpointError, match=r"ema_state_dict does not fit the average: it lacks fc[.]bias"):
            runner.train()
