"""Top-level settings of a run: each is honoured, refused, or listed as ignored."""

from __future__ import annotations

import re
import resource
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from engine_cases import PointNet, config, recorded, state_of, train
from torch import nn

from fusedopt import FusedSGD, OptimWrapper, SkipAwareScheduler
from fusedopt.cli import main
from fusedopt.training.engine import MessageHub, Runner
from fusedopt.training.engine.parts import wrap_model
from fusedopt.training.schedulers import StepLR


class TestAutoScaleLR:
    @pytest.mark.parametrize("base", [4, 8, 32])
    def test_the_learning_rates_are_those_of_the_batch_size(self, tmp_path, base):
        cfg = config(tmp_path, auto_scale_lr=dict(base_batch_size=base, enable=True), param_scheduler=None)
        cfg["optim_wrapper"]["paramwise_cfg"] = dict(bias_lr_mult=2.0)
        groups = Runner.from_cfg(cfg).optim_wrapper.optimizer.param_groups
        assert sorted({group["lr"] for group in groups}) == [1e-2 * 8 / base, 2e-2 * 8 / base]

    def test_schedulers_start_from_them(self, tmp_path):
        scheduler = dict(type="StepLR", step_size=1, gamma=0.5)
        cfg = config(tmp_path, auto_scale_lr=dict(base_batch_size=16, enable=True), param_scheduler=scheduler)
        assert recorded(train(cfg)).lrs[::5] == [5e-3, 2.5e-3, 1.25e-3, 6.25e-4]

    def test_every_optimizer_of_several(self, tmp_path):
        entry = dict(optimizer=dict(type="FusedSGD", lr=0.1))
        several = dict(constructor="MultiOptimWrapperConstructor", backbone=entry, head=entry)
        cfg = config(tmp_path, optim_wrapper=several, param_scheduler=None)
        cfg["auto_scale_lr"] = dict(base_batch_size=16, enable=True)
        assert Runner.from_cfg(cfg).optim_wrapper.get_lr() == {"backbone.lr": [0.05], "head.lr": [0.05]}

    def test_it_is_off_by_default(self, tmp_path):
        runner = Runner.from_cfg(config(tmp_path, auto_scale_lr=dict(base_batch_size=1), param_scheduler=None))
        assert runner.optim_wrapper.get_lr() == {"lr": [1e-2]}

    def test_a_run_that_is_resumed_without_it_is_warned(self, tmp_path):
        cfg = config(tmp_path, auto_scale_lr=dict(base_batch_size=16, enable=True))
        train(cfg)
        del cfg["auto_scale_lr"]
        runner = Runner.from_cfg({**cfg, "resume": True})
        runner.train()
        (log, *_) = sorted(tmp_path.glob("*.log"), reverse=True)
        assert "auto_scale_lr" in log.read_text()

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (dict(auto_scale_lr=dict(enable=True)), ValueError, "needs auto_scale_lr.base_batch_size"),
            (dict(auto_scale_lr=dict(enable=1)), TypeError, "auto_scale_lr.enable must be True or False, got 1"),
            (dict(auto_scale_lr=dict(base=1)), ValueError, "auto_scale_lr has the unknown key 'base'"),
            (dict(auto_scale_lr=dict(enable=True, base_batch_size=0)), ValueError, "auto_scale_lr.base_batch_size"),
        ],
    )
    def test_mistakes(self, tmp_path, changes, error, message):
        with pytest.raises(error, match=re.escape(message)):
            Runner.from_cfg(config(tmp_path, **changes))

    @pytest.mark.parametrize("skips", [False, True])
    def test_a_scheduler_that_is_built_is_refused_and_the_wrapper_stays(self, tmp_path, skips):
        model = PointNet()
        wrapper = OptimWrapper(FusedSGD(model.parameters(), lr=0.1))
        scheduler = StepLR(wrapper, step_size=1)
        scheduler = SkipAwareScheduler(scheduler, wrapper) if skips else scheduler
        changes = dict(model=model, optim_wrapper=wrapper, param_scheduler=[scheduler])
        with pytest.raises(ValueError, match="needs the configs of schedulers, got a scheduler that is built"):
            Runner.from_cfg(config(tmp_path, auto_scale_lr=dict(base_batch_size=1, enable=True), **changes))
        assert wrapper.get_lr() == {"lr": [0.1]}

    def test_on_the_command_line(self, tmp_path, monkeypatch):
        built = []
        monkeypatch.setattr(Runner, "train", lambda runner: built.append(runner.optim_wrapper.get_lr()))
        path = tmp_path / "run.py"
        cfg = config(tmp_path / "work", param_scheduler=None, auto_scale_lr=dict(base_batch_size=16))
        path.write_text("\n".join(f"{key} = {value!r}" for key, value in cfg.items()))
        assert main(["train", str(path), "--auto-scale-lr"]) == 0
        assert main(["train", str(path)]) == 0
        assert built == [{"lr": [5e-3]}, {"lr": [1e-2]}]


class Wrapper(nn.Module):
    def __init__(self, module, **settings):
        super().__init__()
        self.module, self.settings = module, settings


class TestSeveralProcesses:
    def build(self, **settings):
        return wrap_model(PointNet(batch_norm=True), dict(type=Wrapper), torch.device("cpu"), True, **settings)

    def test_find_unused_parameters(self, tmp_path):
        assert self.build(find_unused_parameters=True).settings["find_unused_parameters"] is True
        assert "find_unused_parameters" not in self.build().settings
        train(config(tmp_path, find_unused_parameters=True, sync_bn="torch"))
        with pytest.raises(TypeError, match="find_unused_parameters must be True or False, got 1"):
            Runner.from_cfg(config(tmp_path, find_unused_parameters=1))

    def test_sync_bn(self, tmp_path):
        norms = [type(self.build(sync_bn=value).module.backbone[1]) for value in ("torch", None)]
        assert norms == [nn.SyncBatchNorm, nn.BatchNorm1d]
        with pytest.raises(ValueError, match="Invalid sync_bn: 'mmcv'; expected 'torch' or None"):
            Runner.from_cfg(config(tmp_path, sync_bn="mmcv"))


class TestCompile:
    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own compiler reads it, and hides the warning
    def test_the_same_run(self, tmp_path):
        plain = state_of(train(config(tmp_path / "plain", model=dict(type="PointNet", dropout=0.0))))
        cfg = config(tmp_path / "compiled", model=dict(type="PointNet", dropout=0.0), compile=dict(backend="eager"))
        runner = train(cfg)
        for name, value in state_of(runner)["weights"].items():
            assert torch.equal(value, plain["weights"][name])
        compiled = runner.model.train_step
        runner.train_loop.epoch, runner.train_loop.stop_training = 0, True
        runner.train()
        assert runner.model.train_step is compiled, "it is compiled once"

    def test_true_is_torchs_defaults(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
        train(config(tmp_path, compile=True))
        train(config(tmp_path, compile=dict(mode="reduce-overhead")))
        train(config(tmp_path, compile=False))
        assert calls == [{}, dict(mode="reduce-overhead")]
        with pytest.raises(TypeError, match="compile must be True, False or a dict"):
            Runner.from_cfg(config(tmp_path, compile="yes"))


class TestEnvironment:
    def test_the_number_of_files_is_raised_and_never_lowered(self, tmp_path):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = min(before[0], 512), before[1]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            Runner.from_cfg(config(tmp_path, env_cfg=dict(resource_limit=600)))
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
            Runner.from_cfg(config(tmp_path, env_cfg=dict(resource_limit=64)))
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def test_opencvs_threads(self, tmp_path, monkeypatch):
        threads = []
        monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(setNumThreads=threads.append))
        Runner.from_cfg(config(tmp_path, env_cfg=dict(mp_cfg=dict(opencv_num_threads=0))))
        assert threads == [0]
        monkeypatch.setitem(sys.modules, "cv2", None)  # not installed
        Runner.from_cfg(config(tmp_path, env_cfg=dict(mp_cfg=dict(opencv_num_threads=0))))

    def test_workers_are_forked_unless_it_says_otherwise(self, tmp_path):
        """As in MMEngine. Python 3.14 has another default, which imports torch in each worker, for seconds."""
        for mp_cfg, expected in (({}, "fork"), (dict(mp_start_method="spawn"), "spawn")):
            cfg = config(tmp_path, env_cfg=dict(mp_cfg=mp_cfg))
            cfg["train_dataloader"] = {**cfg["train_dataloader"], "num_workers": 1}
            context = Runner.from_cfg(cfg).train_dataloader.multiprocessing_context
            assert context.get_start_method() == expected

    def test_an_unknown_key(self, tmp_path):
        with pytest.raises(ValueError, match=r"env_cfg\.mp_cfg has the unknown key 'start_method'.*mp_start_method"):
            Runner.from_cfg(config(tmp_path, env_cfg=dict(mp_cfg=dict(start_method="fork"))))


def test_one_warning_lists_the_keys_without_effect(tmp_path, capsys):
    cfg = config(tmp_path, strategy=dict(type="DDP"), num_classes=3, custom_imports=dict(imports=["math"]))
    train(cfg)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no effect" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "These keys of the config have no effect on the Runner: strategy, num_classes"
    )
    train(config(tmp_path))
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        dict(randomness=dict(seed=0, deterministic="no")),
        dict(randomness=dict(seed=0, diff_rank_seed="no")),
        dict(env_cfg=dict(cudnn_benchmark="no")),
        dict(log_processor=dict(by_epoch="no")),
        dict(val_cfg=dict(fp16="no")),
    ],
)
def test_text_is_no_flag(tmp_path, changes):
    with pytest.raises(TypeError, match="must be True or False, got 'no'"):
        Runner.from_cfg(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(log_processor=dict(type="Mine")), "log_processor has the type 'Mine'; only LogProcessor"),
        (dict(env_cfg=dict(mp_cfg=dict(mp_start_method="forkk"))), "Invalid env_cfg.mp_cfg.mp_start_method: 'forkk'"),
        (dict(compile=dict(bakend="eager")), "compile has the unknown key 'bakend'; did you mean 'backend'"),
        (dict(default_scope=5), "default_scope must be a string or None, got 5"),
    ],
)
def test_what_would_be_ignored(tmp_path, changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Runner.from_cfg(config(tmp_path, **changes))


def test_a_key_that_is_no_text(tmp_path):
    Runner.from_cfg({**config(tmp_path), 1: 2})


def test_sections_of_another_scope(tmp_path):
    cfg = config(tmp_path, log_processor=dict(type="LogProcessor", window_size=3, _scope_="mmengine"))
    assert Runner.from_cfg(cfg).message_hub.window_size == 3


def test_each_thread_has_the_hub_of_its_runner(tmp_path):
    hubs = [MessageHub(), MessageHub()]
    seen: dict[int, list[bool]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        with hubs[number].as_current():
            barrier.wait()
            seen[number].append(MessageHub.get_current_instance() is hubs[number])
            barrier.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: [True], 1: [True]}
    with hubs[0].as_current():  # a thread of the model's, which inherits no context
        found: list[MessageHub] = []
        thread = threading.Thread(target=lambda: found.append(MessageHub.get_current_instance()))
        thread.start()
        thread.join()
        assert found == [hubs[0]]
