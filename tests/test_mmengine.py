"""Inside MMEngine: its own Runner trains a digits model with our optimizers and wrappers, in three ways."""

from __future__ import annotations

import argparse
import collections
import copy
import importlib
import itertools
import logging
import os
import pickletools
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizer_module

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and torch warn of while MMEngine is imported is not ours
    reason = "mmengine is not installed: pip install 'fusedopt[mmengine]'"
    pytest.importorskip("mmengine", reason=reason)
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    from mmengine import optim as mmengine_optim
    from mmengine.config import Config, DictAction
    from mmengine.logging import HistoryBuffer, MessageHub
    from mmengine.optim.optimizer import amp_optimizer_wrapper
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
    from mmengine.runner import Runner
    from mmengine_digits import CONFIG

    import fusedopt
    from fusedopt.integrations import mmengine_log
    from fusedopt.integrations.mmengine import FusedAmpOptimWrapper, FusedOptimWrapper, FusedOptimWrapperConstructor
    from fusedopt.integrations.mmengine_log import announce_path, announce_stock_path, gradient_passes

# What the import watches for would be the first fused step of any test.
optimizer_module._global_optimizer_pre_hooks.clear()

# MMEngine's Runner uses what torch deprecated and reads checkpoints as torch advises against.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:mmengine"),
]

numbers = itertools.count()
INTEGRATION, REPLACE = "fusedopt.integrations.mmengine", "fusedopt.integrations.mmengine.replace"
# (a): no edit of the config, one option on the command line.
OPTION = "optim_wrapper.optimizer.type=fusedopt.FusedAdamW"


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards; resuming works on torch >= 2.6, as MMEngine's users make it work."""
    monkeypatch.setattr(optimizer_module, "_global_optimizer_pre_hooks", collections.OrderedDict())
    monkeypatch.setattr(mmengine_log, "_watching", False)
    for registry in (OPTIMIZERS, OPTIM_WRAPPERS):
        monkeypatch.setattr(registry, "_module_dict", dict(registry._module_dict))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delitem(sys.modules, REPLACE, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


@pytest.fixture
def cpu_amp(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine's AmpOptimWrapper asserts a GPU, and its scaler is CUDA's."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))


def load(folder: Path, *options: str, imports: str = "") -> Config:
    """The config as a training script loads it: custom imports first, then ``--cfg-options``."""
    path = folder / "config.py"
    path.write_text(CONFIG.format(imports=repr(imports) if imports else ""))
    cfg = Config.fromfile(path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    if options:
        cfg.merge_from_dict(parser.parse_args(["--cfg-options", *options]).cfg_options)
    cfg.work_dir = str(folder)
    cfg.experiment_name = f"digits_{next(numbers)}"
    return cfg


def run(cfg: Config) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def parameters_of(runner: Runner) -> list[torch.Tensor]:
    return [param.detach().clone() for param in runner.model.parameters()]


def log_of(runner: Runner) -> list[str]:
    return Path(runner.log_dir, f"{runner.timestamp}.log").read_text().splitlines()


def path_lines(runner: Runner) -> list[str]:
    return [line.partition("fusedopt: ")[2] for line in log_of(runner) if "fusedopt: " in line]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The stock training all are compared with."""
    sys.path.append(str(Path(__file__).parent))
    runner = run(load(tmp_path_factory.mktemp("stock")))
    hub = runner.message_hub
    return {
        "parameters": parameters_of(runner),
        "norms": hub.get_scalar("train/grad_norm").data[0],
        "accuracy": hub.get_scalar("val/accuracy").current(),
        "state": runner.optim_wrapper.state_dict(),
    }


def assert_like(runner: Runner, stock: dict[str, Any], rtol: float = 1e-3) -> None:
    for actual, expected in zip(parameters_of(runner), stock["parameters"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5)
    assert runner.message_hub.get_scalar("val/accuracy").current() == pytest.approx(stock["accuracy"], abs=0.02)


class TestThreeWays:
    """The same training with the type swapped in, compared with the stock one."""

    def test_the_stock_training_learns(self, stock):
        assert stock["accuracy"] > 0.8

    def test_a_an_option_on_the_command_line(self, tmp_path, stock):
        runner = run(load(tmp_path, OPTION))
        assert type(runner.optim_wrapper) is mmengine_optim.OptimWrapper
        assert type(runner.optim_wrapper.optimizer) is fusedopt.FusedAdamW
        assert_like(runner, stock)
        assert runner.message_hub.get_scalar("train/grad_norm").data[0] == pytest.approx(stock["norms"], rel=1e-4)

    def test_a_says_that_only_the_update_is_fused(self, tmp_path):
        """In a process of its own, where nothing but the option mentions fusedopt's optimizers."""
        cfg = load(tmp_path, OPTION, "train_cfg.max_epochs=2")
        cfg.dump(tmp_path / "dumped.py")
        script = (
            f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
            "from mmengine.config import Config\n"
            "from mmengine.runner import Runner\n"
            "assert 'fusedopt' not in sys.modules\n"
            f"runner = Runner.from_cfg(Config.fromfile({str(tmp_path / 'dumped.py')!r}))\n"
            "runner.train()\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        (line,) = [line for line in done.stdout.splitlines() if "fusedopt: " in line]
        assert "fusedopt: FusedAdamW (backend " in line
        assert "is not driven by a fusedopt wrapper: only the update is fused, 0 passes" in line

    def test_b_our_wrapper_by_its_name(self, tmp_path, stock):
        options = ("optim_wrapper.type=FusedOptimWrapper", "optim_wrapper.optimizer.type=FusedAdamW")
        runner = run(load(tmp_path, *options, imports=INTEGRATION))
        assert type(runner.optim_wrapper) is FusedOptimWrapper
        assert isinstance(runner.optim_wrapper, mmengine_optim.OptimWrapper)
        assert runner.optim_wrapper.optimizer.clip_grad["max_norm"] == 0.5
        assert_like(runner, stock)
        assert runner.message_hub.get_scalar("train/grad_norm").data[0] == pytest.approx(stock["norms"], rel=1e-4)
        assert any("grad_norm: " in line for line in log_of(runner))
        (line,) = path_lines(runner)
        assert line.startswith("FusedOptimWrapper drives FusedAdamW (backend ")
        assert line.endswith("it makes 1 of the 2 stock passes over the gradients before the update, 1 saved")

    def test_b_by_one_option_in_a_new_process(self, tmp_path):
        option = f"optim_wrapper.constructor={INTEGRATION}.FusedOptimWrapperConstructor"
        code = (
            "import sys, test_mmengine as t; from pathlib import Path\n"
            f"runner = t.run(t.load(Path({str(tmp_path)!r}), {option!r}))\n"
            "print(type(runner.optim_wrapper).__name__, type(runner.optim_wrapper.optimizer).__name__)"
        )
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
        assert "FusedOptimWrapper FusedAdamW" in done.stdout, done.stderr[-2000:]

    def test_b_by_one_option(self, tmp_path, stock):
        runner = run(load(tmp_path, f"optim_wrapper.constructor={INTEGRATION}.FusedOptimWrapperConstructor"))
        assert type(runner.optim_wrapper) is FusedOptimWrapper
        assert type(runner.optim_wrapper.optimizer) is fusedopt.FusedAdamW
        assert_like(runner, stock)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"type": "ApexOptimWrapper"},
                "optim_wrapper.type='ApexOptimWrapper' has no fused twin",
            ),
            ({"optimizer": dict(type="Adamax", lr=0.1)}, "optim_wrapper.optimizer.type='Adamax' has no fused twin"),
            ({"optimizer": None}, "which has no dict 'optimizer'"),
            ({"optimizer": dict(type=type("AdamW", (torch.optim.AdamW,), {}), lr=0.1)}, "has no fused twin; expected"),
            (
                {"type": type("OptimWrapper", (mmengine_optim.OptimWrapper,), {})},
                "has no fused twin",
            ),
        ],
    )
    def test_b_by_one_option_without_a_twin(self, change, message):
        cfg = {"optimizer": dict(type="AdamW", lr=0.1), **change}
        with pytest.raises(ValueError, match=message):
            FusedOptimWrapperConstructor(cfg)
        for kind in ("AdamW", "FusedAdamW", torch.optim.AdamW, "torch.optim.AdamW"):
            made = FusedOptimWrapperConstructor(dict(type="AmpOptimWrapper", optimizer=dict(type=kind, lr=0.1)))(
                nn.Linear(1, 1)
            )
            assert type(made) is FusedAmpOptimWrapper and type(made.optimizer) is fusedopt.FusedAdamW

    def test_c_our_wrapper_in_the_stock_ones_place(self, tmp_path, stock):
        runner = run(load(tmp_path, OPTION, imports=REPLACE))
        assert type(runner.optim_wrapper) is FusedOptimWrapper
        assert_like(runner, stock)
        (line,) = path_lines(runner)
        assert "1 saved" in line

    def test_c_with_an_optimizer_that_is_not_fused(self, tmp_path, stock):
        runner = run(load(tmp_path, imports=REPLACE))
        assert (
            type(runner.optim_wrapper) is FusedOptimWrapper
            and type(runner.optim_wrapper.optimizer) is torch.optim.AdamW
        )
        for actual, expected in zip(parameters_of(runner), stock["parameters"], strict=True):
            assert torch.equal(actual, expected), "the stock way, bit by bit"
        (line,) = path_lines(runner)
        assert line == "FusedOptimWrapper drives AdamW in the stock way; 0 of 2 passes over the gradients are saved"


def hard_set_amp(cfg: Config) -> Config:
    """What ``--amp`` of MMPretrain's training script does; and fewer epochs, in bfloat16, which a CPU trains in."""
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    cfg.optim_wrapper.dtype = "bfloat16"
    return cfg


class TestMixedPrecision:
    @pytest.fixture(scope="class")
    def stock_amp(self, tmp_path_factory):
        sys.path.append(str(Path(__file__).parent))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
            patch.setattr(amp_optimizer_wrapper, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))
            # Its autocast asks for a GPU too.
            patch.setattr("mmengine.runner.amp.get_device", lambda: "cpu")
            runner = run(hard_set_amp(load(tmp_path_factory.mktemp("stock_amp"))))
        return {
            "parameters": parameters_of(runner),
            "accuracy": runner.message_hub.get_scalar("val/accuracy").current(),
            "state": runner.optim_wrapper.state_dict(),
        }

    def test_a_under_the_stock_wrapper(self, tmp_path, stock_amp, cpu_amp):
        runner = run(hard_set_amp(load(tmp_path, OPTION)))
        assert type(runner.optim_wrapper) is mmengine_optim.AmpOptimWrapper
        assert type(runner.optim_wrapper.optimizer) is fusedopt.FusedAdamW
        assert_like(runner, stock_amp, rtol=0.05)

    def test_b_our_wrapper_needs_no_gpu(self, tmp_path, stock_amp):
        options = ("optim_wrapper.optimizer.type=FusedAdamW", "optim_wrapper.dtype=bfloat16")
        runner = run(load(tmp_path, "optim_wrapper.type=FusedAmpOptimWrapper", *options, imports=INTEGRATION))
        assert type(runner.optim_wrapper) is FusedAmpOptimWrapper
        assert isinstance(runner.optim_wrapper, mmengine_optim.AmpOptimWrapper)
        assert_like(runner, stock_amp, rtol=0.05)
        (line,) = path_lines(runner)
        assert line.endswith("it makes 1 of the 3 stock passes over the gradients before the update, 2 saved")

    def test_c_takes_what_amp_hard_sets(self, tmp_path, stock_amp):
        runner = run(hard_set_amp(load(tmp_path, OPTION, imports=REPLACE)))
        assert type(runner.optim_wrapper) is FusedAmpOptimWrapper
        assert_like(runner, stock_amp, rtol=0.05)

    def test_state_dicts_go_both_ways(self, stock_amp, cpu_amp):
        assert "loss_scaler" in stock_amp["state"] and "base_param_settings" in stock_amp["state"]
        shapes = [param.shape for param in stock_amp["parameters"]]
        make = lambda kind, optimizer: OPTIM_WRAPPERS.build(  # noqa: E731
            dict(
                type=kind,
                optimizer=optimizer([dict(params=[nn.Parameter(torch.zeros(shape))]) for shape in shapes], lr=0.1),
            )
        )
        ours = make(FusedAmpOptimWrapper, fusedopt.FusedAdamW)
        ours.load_state_dict(stock_amp["state"])
        saved = ours.state_dict()
        assert set(saved) == set(stock_amp["state"])
        theirs = make("AmpOptimWrapper", torch.optim.AdamW)
        theirs.load_state_dict(copy.deepcopy(saved))
        again = theirs.state_dict()
        for index, state in stock_amp["state"]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, saved["state"][index][key]) and torch.equal(value, again["state"][index][key])
        assert again["loss_scaler"] == saved["loss_scaler"] == stock_amp["state"]["loss_scaler"]
        assert again["base_param_settings"]["lr"] == stock_amp["state"]["base_param_settings"]["lr"]


WAYS = {
    "a": ((OPTION,), ""),
    "b": (("optim_wrapper.type=FusedOptimWrapper", "optim_wrapper.optimizer.type=FusedAdamW"), INTEGRATION),
    "b-amp": (
        (
            "optim_wrapper.type=FusedAmpOptimWrapper",
            "optim_wrapper.optimizer.type=FusedSGD",
            "optim_wrapper.optimizer.momentum=0.9",
            "optim_wrapper.dtype=float16",
        ),
        INTEGRATION,
    ),
    "c": ((OPTION,), REPLACE),
}


class TestCheckpoints:
    @pytest.mark.parametrize("way", WAYS)
    def test_resuming_gives_the_same_bits(self, tmp_path, way):
        options, imports = WAYS[way]
        (tmp_path / "whole").mkdir()
        (tmp_path / "resumed").mkdir()
        whole = run(load(tmp_path / "whole", *options, imports=imports))

        # Three epochs, 30 iterations, are whole steps of 3 accumulated ones each; another Runner does the rest.
        cfg = load(tmp_path / "resumed", *options, imports=imports)
        cfg.resume, cfg.load_from = True, str(tmp_path / "whole" / "epoch_3.pth")
        resumed = run(cfg)
        assert resumed.epoch == 4
        for actual, expected in zip(parameters_of(resumed), parameters_of(whole), strict=True):
            assert torch.equal(actual, expected)
        theirs, ours = whole.optim_wrapper.state_dict(), resumed.optim_wrapper.state_dict()
        assert theirs.keys() == ours.keys() and theirs.get("loss_scaler") == ours.get("loss_scaler")
        for index, state in theirs["state"].items():
            assert all(torch.equal(value, ours["state"][index][key]) for key, value in state.items())
        norms = [runner.message_hub.get_scalar("train/grad_norm").data[0].tolist() for runner in (whole, resumed)]
        assert norms[0] == norms[1]

    def test_a_checkpoint_holds_mmengines_own_classes(self, tmp_path):
        options, imports = WAYS["b"]
        cfg = load(tmp_path, *options, imports=imports)
        cfg.train_cfg.max_epochs = 2
        run(cfg)
        with zipfile.ZipFile(tmp_path / "epoch_2.pth") as archive:
            (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        classes = {argument for code, argument, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
        assert any("HistoryBuffer" in name for name in classes)
        assert not any(name.startswith("fusedopt") for name in classes)
        checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
        assert type(checkpoint["message_hub"]["log_scalars"]["train/grad_norm"]) is HistoryBuffer

    def test_a_checkpoint_of_its_runner_loads_outside_of_it(self, tmp_path, stock):
        cfg = load(tmp_path)
        runner = run(cfg)
        saved = torch.load(tmp_path / "epoch_4.pth", weights_only=False)
        wrapper = fusedopt.build_optim_wrapper(
            runner.model,
            dict(
                optimizer=dict(type="FusedAdamW", lr=1.0, weight_decay=0.05),
                paramwise_cfg=cfg.optim_wrapper.paramwise_cfg.to_dict(),
            ),
        )
        wrapper.load_state_dict(saved["optimizer"])
        assert wrapper.get_lr() == runner.optim_wrapper.get_lr()
        for index, state in stock["state"]["state"].items():
            ours = wrapper.state_dict()["state"][index]
            assert all(torch.equal(value, ours[key]) for key, value in state.items())

    def test_a_stock_checkpoint_is_resumed_with_ours(self, tmp_path, stock):
        """Whoever swaps the type in the middle of a training."""
        (tmp_path / "stock").mkdir()
        cfg = load(tmp_path / "stock")
        run(cfg)
        options, imports = WAYS["b"]
        cfg = load(tmp_path, *options, imports=imports)
        cfg.resume, cfg.load_from = True, str(tmp_path / "stock" / "epoch_3.pth")
        assert_like(run(cfg), stock)


class TestGradNorm:
    def test_is_logged_without_a_read_on_the_host(self, monkeypatch):
        param = nn.Parameter(torch.ones(3))
        hub = MessageHub.get_instance(f"hub_{next(numbers)}")
        wrapper = FusedOptimWrapper(fusedopt.FusedSGD([param], lr=0.0), clip_grad=dict(max_norm=1.0))
        if wrapper.optimizer.backend_in_use == "reference":
            pytest.skip("needs the compiled module: the reference backend reads on the host")
        wrapper.message_hub = hub
        for name in ("item", "__float__", "tolist", "__bool__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *args: pytest.fail("a tensor was read on the host"))
        for factor in (1.0, 2.0):
            wrapper.update_params(param.sum() * factor)
        monkeypatch.undo()
        history = hub.get_scalar("train/grad_norm")
        assert history.current() == pytest.approx(2 * 3**0.5)
        assert history.mean(2) == pytest.approx(1.5 * 3**0.5)
        assert history.statistics("max", 2) == pytest.approx(2 * 3**0.5)
        assert history.data[1].tolist() == [1, 1]

    def test_does_not_pile_up_where_nobody_reads_it(self):
        param = nn.Parameter(torch.ones(1))
        wrapper = FusedOptimWrapper(fusedopt.FusedSGD([param], lr=0.0), clip_grad=dict(max_norm=1.0))
        wrapper.message_hub = MessageHub.get_instance(f"hub_{next(numbers)}")
        for _ in range(1030):
            wrapper.update_params(param.sum())
        history = wrapper.message_hub.get_scalar("train/grad_norm")
        assert len(history._pending) == 6 and len(history.data[0]) == 1030


class OwnStep(FusedOptimWrapper):
    """A user's, written for MMEngine's OptimWrapper."""

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self._clip_grad()
        self.optimizer.step(**kwargs)


class OwnAmpStep(FusedAmpOptimWrapper):
    """A user's, written for MMEngine's AmpOptimWrapper."""

    def step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)


class TestOwnStep:
    """Subclasses that use MMEngine's protected names."""

    @pytest.mark.parametrize("clip_grad", [dict(max_norm=0.5), dict(type="value", clip_value=0.25), None])
    @pytest.mark.parametrize("kind", [OwnStep, OwnAmpStep])
    @pytest.mark.parametrize("cls", [torch.optim.SGD, fusedopt.FusedSGD])
    def test_clips_once(self, cls, kind, clip_grad):
        updated = []
        for wrapper_class in (kind, kind.__base__):
            param = nn.Parameter(torch.ones(3))
            wrapper = wrapper_class(optimizer=cls([param], lr=0.1), clip_grad=clip_grad)
            wrapper.message_hub = MessageHub.get_instance(f"hub_{next(numbers)}")
            wrapper.update_params(param.sum())
            updated.append(param)
        torch.testing.assert_close(*updated)
        logs = "train/grad_norm" in wrapper.message_hub.log_scalars
        assert logs == bool(clip_grad and "max_norm" in clip_grad)

    def test_the_names_mean_what_they_mean_there(self):
        make = lambda clip_grad: FusedOptimWrapper(  # noqa: E731
            fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], lr=0.1), clip_grad=clip_grad
        )
        by_norm, by_value = make(dict(max_norm=0.5)), make(dict(type="value", clip_value=0.25))
        assert by_norm.clip_grad_kwargs == dict(max_norm=0.5, norm_type=2.0, error_if_nonfinite=False)
        assert (by_norm.clip_func, by_norm.grad_name) == (torch.nn.utils.clip_grad_norm_, "grad_norm")
        assert by_value.clip_grad_kwargs == dict(clip_value=0.25)
        assert (by_value.clip_func, by_value.grad_name) == (torch.nn.utils.clip_grad_value_, "grad_value")
        assert make(None).clip_grad_kwargs is None and not hasattr(make(None), "clip_func")


class TestPath:
    @pytest.mark.parametrize(
        ("wrapper", "clip_grad", "passes"),
        [
            (FusedOptimWrapper, None, (0, 0)),
            (FusedOptimWrapper, dict(max_norm=1.0), (2, 1)),
            (FusedOptimWrapper, dict(type="value", clip_value=1.0), (1, 0)),
            (FusedAmpOptimWrapper, None, (1, 1)),
            (FusedAmpOptimWrapper, dict(max_norm=1.0), (3, 1)),
            (FusedAmpOptimWrapper, dict(type="value", clip_value=1.0), (2, 1)),
        ],
    )
    def test_counts_passes_over_the_gradients(self, wrapper, clip_grad, passes):
        fused = wrapper(optimizer=fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], lr=0.1), clip_grad=clip_grad)
        plain = wrapper(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), clip_grad=clip_grad)
        assert gradient_passes(fused) == passes
        assert gradient_passes(plain) == (passes[0], passes[0])

    @pytest.fixture
    def lines(self, monkeypatch) -> list[str]:
        found: list[str] = []
        monkeypatch.setattr("mmengine.logging.print_log", lambda line, logger, level=logging.INFO: found.append(line))
        return found

    @pytest.fixture
    def optimizers(self) -> list[torch.optim.Optimizer]:
        params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        return [cls(params, lr=0.1) for cls in (torch.optim.SGD, fusedopt.FusedSGD, fusedopt.FusedSGD)]

    def test_a_step_of_our_wrapper_does_not_hide_a_stock_one(self, lines, optimizers):
        stock, ours, other = optimizers
        announce_stock_path()
        stock.step()
        assert lines == []
        announce_path(fusedopt.OptimWrapper(ours))
        ours.step()
        ours.step()
        other.step()
        first, second = lines
        assert first.startswith("fusedopt: OptimWrapper drives FusedSGD") and "0 saved" in first
        assert "FusedSGD (backend " in second and "not driven by a fusedopt wrapper" in second, "that of `other`"

    def test_the_local_optimizer_of_a_sharded_one_is_driven_by_its_wrapper(self, lines, optimizers):
        sharded, local, _ = optimizers
        sharded.optim = local  # as torch's ZeroRedundancyOptimizer has it
        announce_stock_path()
        announce_path(fusedopt.OptimWrapper(sharded))
        local.step()
        assert len(lines) == 1 and "not driven by" not in lines[0]

    def test_a_wrapper_of_ours_outside_of_the_runner_is_no_stock_one(self, lines, optimizers):
        announce_stock_path()
        fusedopt.OptimWrapper(optimizers[1]).step()
        assert lines == []

    def test_the_watch_ends_after_many_steps_of_our_wrappers(self, lines, optimizers):
        _, ours, other = optimizers
        hooks = optimizer_module._global_optimizer_pre_hooks
        announce_stock_path()
        announce_path(fusedopt.OptimWrapper(ours))
        for _ in range(99):
            ours.step()
        assert len(hooks) == 1
        ours.step()
        assert len(hooks) == 0
        other.step()
        assert len(lines) == 1

    def test_the_watch_ends_with_the_first_step_under_a_stock_wrapper(self, lines, optimizers):
        _, fused, other = optimizers
        hooks = optimizer_module._global_optimizer_pre_hooks
        before = len(hooks)
        announce_stock_path()
        assert len(hooks) == before + 1
        fused.step()
        assert len(hooks) == before
        other.step()
        assert len(lines) == 1 and "not driven by a fusedopt wrapper" in lines[0]

    def test_the_watch_does_not_disturb_other_hooks(self, lines, optimizers):
        stock, fused, other = optimizers
        announce_stock_path()
        steps = []
        handle = optimizer_module.register_optimizer_step_pre_hook(lambda *args: steps.append(args[0]))
        for optimizer in (fused, other, stock):
            optimizer.step()
        handle.remove()
        assert steps == [fused, other, stock] and len(lines) == 1
        assert len(optimizer_module._global_optimizer_pre_hooks) == 1
        stock.step()
        assert len(optimizer_module._global_optimizer_pre_hooks) == 0, "it leaves when it is the last"

    def test_the_names_are_registered(self):
        fused = [name for name in fusedopt.OPTIMIZERS if name.startswith("Fused")]
        assert {"FusedSGD", "FusedAdam", "FusedAdamW"} <= set(fused)
        for name in fused:
            assert OPTIMIZERS.get(name) is getattr(fusedopt, name)
        assert OPTIM_WRAPPERS.get("FusedOptimWrapper") is FusedOptimWrapper
        assert OPTIM_WRAPPERS.get("OptimWrapper") is mmengine_optim.OptimWrapper


def test_everything_of_mmengine_optim_is_exported():
    schedulers = ("LR", "Momentum", "ParamScheduler")  # in fusedopt.training.schedulers, see test_schedulers.py
    missing = [name for name in mmengine_optim.__all__ if not name.endswith(schedulers) and not hasattr(fusedopt, name)]
    assert missing == ["ApexOptimWrapper"]  # a config that names it gets an error that says what to use


class TestConstructors:
    """Those that MMEngine has not are there, and make its wrappers."""

    def model(self) -> nn.Module:
        model = nn.Module()
        model.body, model.head = nn.Linear(3, 3), nn.Linear(3, 1)
        model.get_layer_depth = lambda name: (0 if name.startswith("body") else 1, 2)
        return model

    def build(self, cfg: dict[str, Any]) -> Any:
        return mmengine_optim.build_optim_wrapper(self.model(), cfg)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (None, mmengine_optim.OptimWrapper),
            ("OptimWrapper", mmengine_optim.OptimWrapper),
            ("FusedOptimWrapper", FusedOptimWrapper),
            (FusedAmpOptimWrapper, FusedAmpOptimWrapper),
        ],
    )
    def test_layer_decay(self, kind, expected):
        cfg = dict(
            constructor="LearningRateDecayOptimWrapperConstructor",
            optimizer=dict(type="FusedSGD", lr=0.1),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        )
        wrapper = self.build({**cfg, **({} if kind is None else dict(type=kind))})
        assert type(wrapper) is expected and type(wrapper.optimizer) is fusedopt.FusedSGD
        assert [group["lr"] for group in wrapper.optimizer.param_groups] == [0.05, 0.05, 0.1, 0.1]

    def test_the_other_dialect_of_layer_decay(self):
        cfg = dict(
            constructor="LearningRateDecayOptimizerConstructor",
            optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.1),
            paramwise_cfg=dict(decay_rate=0.5, num_layers=1),
        )
        wrapper = self.build(cfg)
        assert type(wrapper) is mmengine_optim.OptimWrapper and len(wrapper.optimizer.param_groups) == 4

    def test_several(self):
        entry = dict(optimizer=dict(type="FusedAdam", lr=0.1))
        cfg = dict(constructor="MultiOptimWrapperConstructor", type="FusedOptimWrapper", accumulative_counts=2)
        wrappers = self.build({**cfg, "body": entry, "head": {**entry, "type": "OptimWrapper"}})
        assert type(wrappers) is mmengine_optim.OptimWrapperDict
        assert [type(each) for each in wrappers.values()] == [FusedOptimWrapper, mmengine_optim.OptimWrapper]
        assert all(each._accumulative_counts == 2 for each in wrappers.values())

    def test_several_modules_of_one_optimizer(self):
        cfg = dict(
            constructor="MultiOptimWrapperConstructor", modules=["body", "head"], optimizer=dict(type="SGD", lr=1)
        )
        wrapper = self.build(cfg)
        assert type(wrapper) is mmengine_optim.OptimWrapper and len(wrapper.optimizer.param_groups[0]["params"]) == 4

    def test_an_optimizer_that_only_mmengine_knows(self):
        OPTIMIZERS.register_module(name="OwnSGD", module=type("OwnSGD", (torch.optim.SGD,), {}))
        entry = dict(optimizer=dict(type="OwnSGD", lr=0.1))
        wrappers = self.build(dict(constructor="MultiOptimWrapperConstructor", body=entry, head=entry))
        assert {type(each.optimizer).__name__ for each in wrappers.values()} == {"OwnSGD"}


class TestNamesOfTheUsersOwn:
    """What somebody else has registered under our names stays theirs, and that is said."""

    @pytest.fixture(autouse=True)
    def _constructors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        constructors = OPTIM_WRAPPER_CONSTRUCTORS
        monkeypatch.setattr(constructors, "_module_dict", dict(constructors._module_dict))

    @pytest.mark.parametrize(
        ("registry", "name"),
        [
            (OPTIMIZERS, "FusedAdamW"),
            (OPTIMIZERS, "FusedSGD"),
            (OPTIM_WRAPPERS, "FusedOptimWrapper"),
            (OPTIM_WRAPPERS, "FusedAmpOptimWrapper"),
            (OPTIM_WRAPPER_CONSTRUCTORS, "MultiOptimWrapperConstructor"),
        ],
    )
    def test_it_stays_with_a_warning(self, registry: Any, name: str) -> None:
        mine = type(name, (torch.optim.AdamW,), {"__module__": "their_package"})
        registry.register_module(name=name, module=mine, force=True)
        with pytest.warns(UserWarning, match=rf"'{name}' in MMEngine's .* registry is their_package\.{name}") as caught:
            importlib.reload(sys.modules[INTEGRATION])
        assert len(caught) == 1 and registry.get(name) is mine
        path = str(caught[0].message).split("type=")[1].strip("'")
        found = registry.get(path)
        assert found is not None and found.__module__.startswith("fusedopt."), "that leads to ours"

    def test_ours_and_what_an_older_import_left_are_replaced(self) -> None:
        old = type("FusedAdamW", (fusedopt.FusedAdamW,), {"__module__": "fusedopt.optimizers.adamw"})
        OPTIMIZERS.register_module(name="FusedAdamW", module=old, force=True)
        importlib.reload(sys.modules[INTEGRATION])
        importlib.reload(sys.modules[INTEGRATION])
        assert OPTIMIZERS.get("FusedAdamW") is fusedopt.FusedAdamW

    def test_replace_takes_the_place_of_the_stock_wrappers_alone(self) -> None:
        mine = type("OptimWrapper", (mmengine_optim.OptimWrapper,), {"__module__": "their_package"})
        OPTIM_WRAPPERS.register_module(name="OptimWrapper", module=mine, force=True)
        with pytest.warns(
            UserWarning, match=r"'OptimWrapper' in MMEngine's .* is their_package\.OptimWrapper"
        ) as caught:
            importlib.import_module(REPLACE)
        assert len(caught) == 1 and OPTIM_WRAPPERS.get("OptimWrapper") is mine
        assert OPTIM_WRAPPERS.get("AmpOptimWrapper") is FusedAmpOptimWrapper
