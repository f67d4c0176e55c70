"""transformers: its Trainer trains with fused optimizers, and their steps unscale and clip."""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from probe import GradientPasses
from torch import nn

import fusedopt

for name in ("accelerate", "transformers"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'fusedopt[transformers]'")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fusedopt.integrations import accelerate as fused_accelerate  # noqa: E402
from fusedopt.integrations.transformers import fuse, unfuse  # noqa: E402

STEPS = 20
PRECISIONS = ["no", "bf16", "fp16"]


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts, which takes ten times as long as to train these models."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps one state for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Model(nn.Module):
    """In float32 under autocast, too, whose rounding turns the last bit of a parameter into a thousandth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            logits = self.last(torch.tanh(self.norm(self.first(x))))
            return {"loss": nn.functional.mse_loss(logits, labels) * factor.mean(), "logits": logits}


@functools.cache
def data(overflow: bool) -> list[dict[str, torch.Tensor]]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    factors = [1e38 if overflow and i == 30 else 1.0 for i in range(4 * STEPS)]
    return [dict(x=draw(6), labels=draw(3), factor=torch.tensor(factor)) for factor in factors]


class Watch(TrainerCallback):
    """Counts passes between the last backward and the end of the step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seen: list[str] = []
        self.norms: list[Any] = []
        clip, step = trainer._get_grad_norm, trainer._clip_grad_norm

        def watched(method: Any, *args: Any, **kwargs: Any) -> Any:
            with GradientPasses(trainer.model.parameters()) as passes:
                norm = method(*args, **kwargs)
            self.seen += passes.seen
            self.norms.append(norm)
            return norm

        trainer._get_grad_norm = functools.partial(watched, clip)
        trainer._clip_grad_norm = functools.partial(watched, step)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.passes = GradientPasses(self.trainer.model.parameters())
        self.passes.__enter__()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.passes.__exit__(None, None, None)
        self.seen += self.passes.seen


def trainer_of(
    fused: bool, tmp_path: Path, precision: str = "no", *, cls: Any = Trainer, model: Any = None, **settings: Any
) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    given = {key: settings.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in settings}
    arguments: dict[str, Any] = dict(
        optim="adamw_torch",
        learning_rate=0.002,
        adam_epsilon=1e-3,  # a gradient that is nearly zero does not turn its rounding error into a full step
        weight_decay=0.1,
        warmup_steps=3,
        max_grad_norm=0.3,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )
    args = TrainingArguments(str(tmp_path / "out"), **(arguments | settings))
    trainer = cls(Model() if model is None else model, args, train_dataset=data(precision == "fp16"), **given)
    trainer.remove_callback(PrinterCallback)
    if precision == "fp16":  # accelerate makes a scaler on accelerators only
        give_scaler(trainer.accelerator)
    trainer.watch = Watch(trainer)
    trainer.add_callback(trainer.watch)
    if fused:
        assert fuse(trainer) is trainer
    return trainer


def give_scaler(accelerator: Any) -> None:
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    accelerator.native_amp = True


def history(trainer: Any, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


def assert_same(ours: Any, theirs: Any) -> None:
    for param, want in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)
    for what, most in (("loss", 1e-5), ("grad_norm", 1e-5), ("learning_rate", 0.0)):
        got, want = history(ours, what), history(theirs, what)
        assert len(got) == len(want) > 0
        assert got == pytest.approx(want, rel=most, abs=0.0, nan_ok=True), what


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("max_grad_norm", [0.3, 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trains_as_the_stock_trainer_without_a_pass(
    tmp_path: Path, precision: str, max_grad_norm: float, accumulation: int
) -> None:
    settings = dict(max_grad_norm=max_grad_norm, gradient_accumulation_steps=accumulation)
    stock = trainer_of(False, tmp_path, precision, **settings)
    stock.train()
    ours = trainer_of(True, tmp_path, precision, **settings)
    ours.train()
    assert_same(ours, stock)
    assert ours.watch.seen == [] and stock.watch.seen != []
    assert type(ours.optimizer.optimizer) is fusedopt.FusedAdamW
    if precision == "fp16":
        overflows = [not norm < float("inf") for norm in history(ours, "grad_norm")]
        assert sum(overflows) >= 1
        at = overflows.index(True)
        rates = history(ours, "learning_rate")
        assert rates[at + 1] == rates[at]  # the schedule waited
        assert ours.accelerator.scaler.get_scale() == stock.accelerator.scaler.get_scale()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_the_optimizer_is_as_written(tmp_path: Path, optim: str) -> None:
    settings = dict(optim=optim, adam_beta1=0.8, adam_epsilon=2e-3, max_steps=4)
    stock, ours = trainer_of(False, tmp_path, **settings), trainer_of(True, tmp_path, **settings)
    stock.train()
    ours.train()
    assert type(ours.optimizer.optimizer) is fusedopt.optimizers.FUSED_TWINS[type(stock.optimizer.optimizer)]
    for group, want in zip(ours.optimizer.param_groups, stock.optimizer.param_groups, strict=True):
        assert {**group, "params": len(group["params"])} == {**want, "params": len(want["params"])}
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.1, 0.0]
    assert_same(ours, stock)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    """With weights that are tied."""

    def run(fused: bool) -> Any:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=32,
                n_positions=8,
                n_embd=8,
                n_layer=2,
                n_head=2,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
        trainer = trainer_of(fused, tmp_path, model=model)
        ids = torch.randint(32, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
        trainer.train_dataset = [dict(input_ids=row, labels=row) for row in ids]
        trainer.train()
        return trainer

    stock, ours = run(False), run(True)
    assert_same(ours, stock)
    assert ours.watch.seen == [] != stock.watch.seen


class TestUsersOwn:
    @pytest.mark.parametrize("precision", ["no", "fp16"])
    def test_optimizer_and_schedule(self, tmp_path: Path, precision: str) -> None:
        """The schedule goes on, although accelerate loads a state dict into the optimizer."""

        def run(fused: bool) -> Any:
            model = Model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-3, foreach=False)
            scheduler = torch.optim.lr_scheduler.ChainedScheduler(
                [
                    torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5),
                    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
                ]
            )
            trainer = trainer_of(fused, tmp_path, precision, model=model, optimizers=(optimizer, scheduler))
            trainer.train()
            return trainer

        stock, ours = run(False), run(True)
        assert len(set(history(stock, "learning_rate"))) > 10
        assert_same(ours, stock)
        assert ours.watch.seen == []
        assert type(ours.optimizer.optimizer) is fusedopt.FusedAdamW

    def test_fused_optimizer(self, tmp_path: Path) -> None:
        model = Model()
        optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.002, eps=1e-3)
        ours = trainer_of(True, tmp_path, model=model, optimizers=(optimizer, None))
        ours.train()
        assert ours.optimizer.optimizer is optimizer and ours.watch.seen == []
        unfuse(ours)
        assert ours.optimizer.optimizer is optimizer
        assert type(ours.optimizer) is AcceleratedOptimizer

    def test_optimizer_that_clips(self, tmp_path: Path) -> None:
        def run(fused: bool) -> Any:
            model = Model()
            if not fused:
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-3, foreach=False)
                trainer = trainer_of(False, tmp_path, model=model, optimizers=(optimizer, None))
            else:
                optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.002, eps=1e-3, clip_grad=dict(max_norm=0.3))
                trainer = trainer_of(True, tmp_path, model=model, optimizers=(optimizer, None), max_grad_norm=0.0)
            trainer.train()
            return trainer

        assert_same(run(True), run(False))
        model = Model()
        optimizer = fusedopt.FusedAdamW(model.parameters(), clip_grad=dict(max_norm=0.3))
        with pytest.raises(ValueError, match="the trainer clips, and FusedAdamW has clip_grad="):
            trainer_of(True, tmp_path, model=model, optimizers=(optimizer, None)).train()

    def test_create_optimizer(self, tmp_path: Path) -> None:
        class Mine(Trainer):
            def create_optimizer(self, model: Any = None) -> Any:
                if self.optimizer is None:
                    self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, foreach=False)
                return self.optimizer

        stock, ours = trainer_of(False, tmp_path, cls=Mine), trainer_of(True, tmp_path, cls=Mine)
        stock.train()
        ours.train()
        assert_same(ours, stock)
        assert type(ours.optimizer.optimizer) is fusedopt.FusedSGD and ours.watch.seen == []

    def test_optimizer_cls_and_kwargs(self, tmp_path: Path) -> None:
        given = dict(optimizer_cls_and_kwargs=(torch.optim.Adam, dict(lr=0.01, eps=1e-3, foreach=False)))
        stock, ours = trainer_of(False, tmp_path, **given), trainer_of(True, tmp_path, **given)
        stock.train()
        ours.train()
        assert_same(ours, stock)
        assert type(ours.optimizer.optimizer) is fusedopt.FusedAdam

    def test_model_init(self, tmp_path: Path) -> None:
        def run(fused: bool) -> Any:
            trainer = trainer_of(fused, tmp_path)
            trainer.model_init = Model
            trainer.watch.seen.clear()
            for _ in range(2):
                trainer.train()
            return trainer

        ours, stock = run(True), run(False)
        assert_same(ours, stock)
        assert type(ours.optimizer.optimizer) is fusedopt.FusedAdamW


@pytest.mark.parametrize("kind", ["adafactor", "subclass"])
def test_another_optimizer_is_left_alone_and_the_log_says_so(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(torch.optim.AdamW):
        pass

    settings: dict[str, Any] = dict(optim="adafactor")
    if kind == "subclass":
        settings = dict(optimizer_cls_and_kwargs=(Mine, dict(lr=0.01, eps=1e-3, foreach=False)))
    stock, ours = trainer_of(False, tmp_path, **settings), trainer_of(True, tmp_path, **settings)
    stock.train()
    with caplog.at_level(logging.INFO, "fusedopt"):
        ours.train()
        ours.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fusedopt")]
    assert said == [f"fusedopt leaves {type(stock.optimizer.optimizer).__name__} as it is: it has no fused twin"]
    assert type(ours.optimizer) is AcceleratedOptimizer
    assert type(ours.optimizer.optimizer) is type(stock.optimizer.optimizer)
    stock.train()
    assert_same(ours, stock)


class TestCheckpoints:
    @pytest.mark.parametrize("precision", ["no", "fp16"])
    @pytest.mark.parametrize("fused", [(True, False), (False, True), (True, True)])
    def test_resume_with_the_other(self, tmp_path: Path, precision: str, fused: tuple[bool, bool]) -> None:
        first = trainer_of(fused[0], tmp_path, precision, save_strategy="steps", save_steps=10)
        first.train()
        second = trainer_of(fused[1], tmp_path, precision)
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
        assert second.state.global_step == STEPS
        assert_same(second, first)
        if precision == "fp16":
            assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()

    def test_resume_with_a_schedule_of_the_users_own(self, tmp_path: Path) -> None:
        def run(fused: bool, checkpoint: str | None = None) -> Any:
            model = Model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-3, foreach=False)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
            save = dict(save_strategy="steps", save_steps=10)
            trainer = trainer_of(fused, tmp_path, model=model, optimizers=(optimizer, scheduler), **save)
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        first = run(False)
        assert_same(run(True, str(tmp_path / "out" / "checkpoint-10")), first)


class TestAcceleratorsMadeAnew:
    def test_are_fused_as_well(self, tmp_path: Path) -> None:
        """As in a search over hyperparameters."""
        ours = trainer_of(True, tmp_path)
        before = ours.accelerator
        ours.create_accelerator_and_postprocess()
        assert ours.accelerator is not before
        ours.train()
        assert ours.watch.seen == []
        unfuse(ours)
        after = ours.accelerator
        ours.create_accelerator_and_postprocess()
        assert ours.accelerator is not after
        assert "_fusedopt" not in vars(after) and "_fusedopt" not in vars(ours.accelerator)

    def test_auto_find_batch_size(self, tmp_path: Path) -> None:
        class OutOfMemory(TrainerCallback):
            def __init__(self) -> None:
                self.left = 1

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 2 and self.left:
                    self.left -= 1
                    raise RuntimeError("CUDA out of memory.")

        def run(fused: bool) -> Any:
            trainer = trainer_of(fused, tmp_path, auto_find_batch_size=True)
            trainer.callback_handler.callbacks.insert(0, OutOfMemory())
            trainer.train()
            return trainer

        stock, ours = run(False), run(True)
        assert_same(ours, stock)
        assert ours._train_batch_size == 3 and ours.watch.seen == []


class TestUndoing:
    def test_before_the_training(self, tmp_path: Path) -> None:
        stock, ours = trainer_of(False, tmp_path), trainer_of(True, tmp_path)
        assert unfuse(ours) is ours
        assert not {"create_optimizer", "_fusedopt"} & {*vars(ours)}
        stock.train()
        ours.train()
        assert type(ours.optimizer.optimizer) is torch.optim.AdamW
        assert type(ours.optimizer) is AcceleratedOptimizer
        assert_same(ours, stock)
        assert len(ours.watch.seen) == len(stock.watch.seen)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_between_two(self, tmp_path: Path, precision: str) -> None:
        """torch's optimizer gets the state that the fused one has, and the other way round."""
        stock, ours = trainer_of(False, tmp_path, precision), trainer_of(True, tmp_path, precision)
        stock.train()
        ours.train()
        held = ours.optimizer
        for change, kind in ((unfuse, torch.optim.AdamW), (fuse, fusedopt.FusedAdamW), (unfuse, torch.optim.AdamW)):
            change(ours)
            assert ours.optimizer is held and type(held.optimizer) is kind
            assert precision != "fp16" or isinstance(ours.accelerator.scaler, fusedopt.amp.GradScaler) == (
                change is fuse
            )
            for trainer in (stock, ours):
                trainer.watch.seen.clear()
                trainer.train()
            assert_same(ours, stock)
            assert (ours.watch.seen == []) == (change is fuse)

    def test_of_an_optimizer_that_was_given(self, tmp_path: Path) -> None:
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        ours = trainer_of(True, tmp_path, model=model, optimizers=(optimizer, scheduler))
        assert type(ours.optimizer) is type(ours.callback_handler.optimizer) is fusedopt.FusedAdamW
        unfuse(ours)
        assert type(ours.optimizer) is type(ours.callback_handler.optimizer) is torch.optim.AdamW
        assert ours.optimizer.param_groups is optimizer.param_groups

    def test_of_one_that_clips_by_now_changes_nothing(self, tmp_path: Path) -> None:
        ours = trainer_of(True, tmp_path, max_steps=2)
        ours.train()
        ours.optimizer.clip_grad = dict(max_norm=1.0)
        with pytest.raises(ValueError, match="does not clip"):
            unfuse(ours)
        assert "_fusedopt" in vars(ours) and "_fusedopt" in vars(ours.accelerator)
        ours.optimizer.clip_grad = None
        unfuse(ours)
        assert type(ours.optimizer.optimizer) is torch.optim.AdamW

    def test_once_is_enough_and_twice_is_the_same(self, tmp_path: Path) -> None:
        ours = trainer_of(True, tmp_path, max_steps=2)
        before = dict(vars(ours))
        fuse(fuse(ours))
        assert dict(vars(ours)) == before
        ours.train()
        optimizer = ours.optimizer.optimizer
        fuse(ours)
        assert ours.optimizer.optimizer is optimizer
        unfuse(unfuse(ours))

    def test_leaves_methods_of_the_users_own(self, tmp_path: Path) -> None:
        ours = trainer_of(False, tmp_path, max_steps=2)
        stock = ours.create_optimizer
        mine = ours.create_optimizer = lambda *args: stock(*args)
        fuse(ours)
        kept = ours.create_optimizer
        unfuse(ours)
        assert ours.create_optimizer is mine
        kept()
        assert type(ours.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP", "XLA"])
def test_where_gradients_lie_elsewhere_the_optimizer_stays(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = trainer_of(True, tmp_path)
    monkeypatch.setattr(ours.accelerator.state, "fsdp_plugin", type("Plugin", (), {"fsdp_version": 1}), raising=False)
    ours.accelerator.state.distributed_type = type(ours.accelerator.distributed_type)(kind)
    assert type(ours.create_optimizer()) is torch.optim.AdamW
    assert f"fusedopt leaves AdamW as it is: the trainer's distributed_type is {kind}" in caplog.text


@pytest.mark.parametrize("what", [None, "trainer"])
def test_something_else_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=f"takes a transformers.Trainer; got {type(what).__name__}"):
        fuse(what)


def test_the_accelerator_is_fused_by_the_same_rules(tmp_path: Path) -> None:
    ours = trainer_of(True, tmp_path, max_steps=2)
    assert isinstance(ours.accelerator._fusedopt, fused_accelerate._Replaced)


def test_without_transformers_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    path = Path(fusedopt.__file__).parent / "integrations" / "transformers.py"
    spec = importlib.util.spec_from_file_location("fusedopt.integrations.transformers_again", path)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"transformers is not installed.*pip install 'fusedopt\[transformers\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    AcceleratorState._reset_state(reset_partial_state=True)
    path = Path(__file__).resolve().parents[2] / "examples" / "transformers_digits.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--epochs", "2"])
    runpy.run_path(str(path), run_name="__main__")
    (line,) = capsys.readouterr().out.splitlines()
    assert float(re.match(r"accuracy ([\d.]+)%", line)[1]) > 75
