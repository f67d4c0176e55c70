"""timm: its optimizer factory and its NativeScaler, with the real package."""

from __future__ import annotations

import copy
import pickle
import runpy
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("timm", reason="timm is not installed: pip install 'fusedopt[timm]'")

from probe import GradientPasses
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from timm.utils import ApexScaler, ModelEmaV3, NativeScaler, ParseKwargs, dispatch_clip_grad

import fusedopt
from fusedopt.amp import GradScaler
from fusedopt.integrations import timm as integration
from fusedopt.integrations.timm import FusedNativeScaler, fuse, unfuse
from fusedopt.optimizers import FUSED_TWINS

REPOSITORY = Path(__file__).resolve().parents[2]
INF = float("inf")
STOCK = {"foreach": False, "fused": False}
#: (clip_grad, clip_mode) of the scaler.
CLIPS = [(None, "norm"), (0.1, "norm"), (0.01, "value"), (0.05, "agc")]
#: An optimizer with each, and each optimizer.
CASES = [("fusedoptadamw", *clip) for clip in CLIPS]
CASES += [("fusedoptadam", 0.1, "norm"), ("fusedoptsgd", 0.1, "norm"), ("fusedoptmomentum", 0.01, "value")]
NAMES = ["fusedoptadamw", "fusedoptadam", "fusedoptsgd", "fusedoptmomentum"]


@pytest.fixture(autouse=True)
def _no_hooks_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "_global_optimizer_pre_hooks", OrderedDict())


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    size = dict(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=8, depth=1, num_heads=2)
    return VisionTransformer(**size).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    for _ in range(count):
        yield torch.randn(4, 1, 8, 8, dtype=dtype), torch.randint(10, (4,))


def make_scaler(fused: bool) -> Any:
    scaler = NativeScaler("cpu")
    return fuse(scaler) if fused else scaler


class Training:
    """A model that timm's parts train."""

    def __init__(self, name: str, fused: bool = False, dtype: torch.dtype = torch.float64, **settings: Any):
        self.model = make_model(dtype)
        self.dtype = dtype
        lr = 0.05 if name.endswith(("sgd", "momentum")) else 2e-3
        own = {} if "fusedopt" in name else STOCK
        self.optimizer = create_optimizer_v2(self.model, name, lr=lr, weight_decay=0.05, **own, **settings)
        self.scaler = make_scaler(fused)
        self.passes: list[str] = []

    def run(
        self,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        steps: int = 20,
        overflow: int | None = 7,
        every: int = 1,
        parameters: Callable[[nn.Module], Any] = nn.Module.parameters,
        autocast: torch.dtype | None = None,
        after: Callable[[int], None] = lambda step: None,
    ) -> list[Tensor]:
        for step, (images, labels) in enumerate(batches(steps, self.dtype)):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                loss = functional.cross_entropy(self.model(images).to(self.dtype), labels)
            if step == overflow:
                loss = loss * INF
            last = (step + 1) % every == 0
            with GradientPasses(self.model.parameters()) as passes:
                self.scaler(loss, self.optimizer, clip_grad, clip_mode, parameters(self.model), need_update=last)
            self.passes += passes.seen
            if last:
                self.optimizer.zero_grad()
                after(step)
        return list(self.model.parameters())


def assert_same(params: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=tolerance, atol=tolerance)


class TestNames:
    def test_they_are_not_those_of_apex(self) -> None:
        assert set(list_optimizers("fusedopt*")) == set(NAMES)
        for name in ("fusedadamw", "fusedadam", "fusedsgd"):
            assert default_registry.get_optimizer_info(name).opt_class.startswith("apex.")

    @pytest.mark.parametrize("name", NAMES)
    def test_arguments_and_groups_are_those_of_timm_s(self, name: str) -> None:
        model = make_model()
        arguments = dict(lr=0.1, weight_decay=0.05, momentum=0.8, betas=(0.8, 0.9), eps=1e-6)
        ours = create_optimizer_v2(model, name, **arguments)
        stock = create_optimizer_v2(model, name.removeprefix("fusedopt"), **arguments)
        assert type(ours) is FUSED_TWINS[type(stock)]
        for group, want in zip(ours.param_groups, stock.param_groups, strict=True):
            assert all(left is right for left, right in zip(group.pop("params"), want.pop("params"), strict=True))
            assert group == {key: value for key, value in want.items() if key in group}
            assert {"lr", "weight_decay"} <= set(group)
        assert {group["weight_decay"] for group in ours.param_groups} == {0.0, 0.05}

    def test_further_arguments_are_the_optimizer_s_also_from_a_command_line(self) -> None:
        import argparse

        parser = argparse.ArgumentParser()
        parser.add_argument("--opt-kwargs", nargs="*", action=ParseKwargs)
        given = parser.parse_args(["--opt-kwargs", "clip_grad={'max_norm': 1.0}"]).opt_kwargs
        optimizer = create_optimizer_v2(make_model(), "fusedoptadamw", lr=0.1, **given)
        assert optimizer.clip_grad["max_norm"] == 1.0

    def test_unregister_and_register_again(self) -> None:
        before = list_optimizers()
        try:
            integration.unregister()
            integration.unregister()
            assert list_optimizers() == [name for name in before if name not in NAMES]
        finally:
            integration.register()
            integration.register()
        assert list_optimizers() == before

    def test_an_entry_of_somebody_else_s_is_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entries = default_registry._optimizers
        theirs = entries["adamw"]
        monkeypatch.setitem(entries, "fusedoptadam", theirs)
        with pytest.warns(UserWarning, match="'fusedoptadam' in timm is .*AdamW.* is kept"):
            integration.register()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(default_registry, "_optimizers", dict(entries))
            integration.unregister()
            assert list_optimizers("fusedopt*") == ["fusedoptadam"]
        assert entries["fusedoptadam"] is theirs


@pytest.mark.parametrize(("name", "clip_grad", "mode"), CASES)
def test_the_weights_are_those_of_timm_s_way(name: str, clip_grad: float | None, mode: str) -> None:
    ours, stock = Training(name, fused=True), Training(name.removeprefix("fusedopt"))
    assert_same(ours.run(clip_grad, mode), stock.run(clip_grad, mode))
    assert ours.scaler.state_dict() == stock.scaler.state_dict()
    assert stock.scaler.state_dict()["scale"] == 2.0**15
    assert len(stock.passes) >= 20
    if mode == "agc":
        assert ours.passes
        assert ours.optimizer.last_step.grad_norm is None
    else:
        assert not ours.passes
        assert (ours.optimizer.last_step.grad_norm is not None) == (clip_grad is not None and mode == "norm")


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("clip_grad", "mode"), CLIPS[:3])
def test_the_same_under_autocast(autocast: torch.dtype, clip_grad: float | None, mode: str) -> None:
    """Weights that differ by a rounding differ by more in 16 bits, so both train from the same ones in each step."""
    ours = Training("fusedoptadamw", True, torch.float32)
    stock = Training("adamw", dtype=torch.float32)
    for step, (images, labels) in enumerate(batches(20, torch.float32)):
        for training in (ours, stock):
            with torch.autocast("cpu", autocast):
                loss = functional.cross_entropy(training.model(images).float(), labels)
            params = list(training.model.parameters())
            with GradientPasses(params) as passes:
                training.scaler(loss * INF if step == 7 else loss, training.optimizer, clip_grad, mode, params)
            training.passes += passes.seen
            training.optimizer.zero_grad()
        assert_same(list(ours.model.parameters()), list(stock.model.parameters()))
        ours.model.load_state_dict(stock.model.state_dict())
    assert stock.passes and not ours.passes


def test_gradients_are_accumulated() -> None:
    ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
    assert_same(ours.run(0.1, every=4), stock.run(0.1, every=4))
    assert not ours.passes and stock.passes
    assert ours.optimizer.state[next(ours.model.parameters())]["step"] == 4  # of five, one overflowed


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_layer_decay_and_a_schedule(name: str) -> None:
    ours, stock = Training(f"fusedopt{name}", True, layer_decay=0.5), Training(name, layer_decay=0.5)
    assert len({group["lr"] * group["lr_scale"] for group in ours.optimizer.param_groups}) > 2
    for training in (ours, stock):
        schedule = CosineLRScheduler(training.optimizer, t_initial=20, warmup_t=3, warmup_lr_init=1e-5)
        training.run(0.1, after=schedule.step)
    assert_same(list(ours.model.parameters()), list(stock.model.parameters()))
    assert [group["lr"] for group in ours.optimizer.param_groups] == [g["lr"] for g in stock.optimizer.param_groups]


class TestLookahead:
    @pytest.mark.parametrize(("name", "clip_grad", "mode"), [*CASES[1:4], *CASES[5:]])
    def test_it_is_stepped_in_timm_s_way(self, name: str, clip_grad: float | None, mode: str) -> None:
        ours = Training(f"lookahead_{name}", fused=True)
        stock = Training(f"lookahead_{name.removeprefix('fusedopt')}")
        assert_same(ours.run(clip_grad, mode), stock.run(clip_grad, mode))
        for training in (ours, stock):  # an overflow does not count
            assert {group["lookahead_step"] for group in training.optimizer.param_groups} == {19}

    def test_resumes(self) -> None:
        whole, first, second = (Training("lookahead_fusedoptadamw", fused=True) for _ in range(3))
        whole.run(0.1, steps=10)
        first.run(0.1, steps=10)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        second.scaler.load_state_dict(first.scaler.state_dict())
        assert_same(second.run(0.1, steps=5), whole.run(0.1, steps=5), 0)


def test_the_average_of_the_weights() -> None:
    ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
    averages = []
    for training in (ours, stock):
        average = ModelEmaV3(training.model, decay=0.5)
        training.run(0.1, after=lambda step, t=training, a=average: a.update(t.model, step))
        averages.append(average.module)
    assert_same(*(list(average.parameters()) for average in averages))


def test_state_is_exchanged_with_timm_s_way() -> None:
    for first, second in (("fusedoptadamw", "adamw"), ("adamw", "fusedoptadamw")):
        start, whole = Training(first, fused="fused" in first), Training(first, fused="fused" in first)
        start.run(0.1, steps=5, overflow=2)
        end = Training(second, fused="fused" in second)
        end.model.load_state_dict(start.model.state_dict())
        end.optimizer.load_state_dict(start.optimizer.state_dict())
        end.scaler.load_state_dict(start.scaler.state_dict())
        whole.run(0.1, steps=5, overflow=2)
        assert_same(end.run(0.1, steps=5), whole.run(0.1, steps=5))


class TestTimmsWay:
    """Where the step cannot clip, timm does, and the numbers are right."""

    @pytest.mark.parametrize(
        "parameters",
        [
            lambda model: list(model.parameters())[:-2],
            lambda model: (param for param in model.parameters() if param.ndim > 1),
            lambda model: [*model.parameters(), next(model.parameters())],
            lambda model: model.head.weight,
        ],
    )
    @pytest.mark.parametrize(("clip_grad", "mode"), CLIPS[1:3])
    def test_other_parameters_than_the_optimizer_s(self, parameters: Any, clip_grad: float, mode: str) -> None:
        ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
        assert_same(ours.run(clip_grad, mode, parameters=parameters), stock.run(clip_grad, mode, parameters=parameters))
        assert ours.passes

    def test_frozen_parameters_and_such_without_a_gradient_do_not_matter(self) -> None:
        ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
        for training in (ours, stock):
            training.model.cls_token.requires_grad_(False)
            training.optimizer.param_groups[1]["params"] = [
                param for param in training.optimizer.param_groups[1]["params"] if param.requires_grad
            ]
        assert_same(ours.run(0.1), stock.run(0.1))
        assert not ours.passes

    @pytest.mark.parametrize("whose", ["its own", "all"])
    @pytest.mark.parametrize("clip_grad", [None, 0.1])
    def test_hooks_before_the_step_see_what_they_would_see(self, clip_grad: float | None, whose: str) -> None:
        seen: dict[str, list[Tensor]] = {"fusedopt": [], "stock": []}

        def look(optimizer: Any, *_: Any) -> None:
            name = "fusedopt" if isinstance(optimizer, fusedopt.FusedAdamW) else "stock"
            seen[name].append(optimizer.param_groups[0]["params"][0].grad.clone())

        for name in ("fusedoptadamw", "adamw"):
            training = Training(name, fused="fused" in name)
            own = training.optimizer.register_step_pre_hook
            handle = (own if whose == "its own" else register_optimizer_step_pre_hook)(look)
            training.run(clip_grad, steps=5, overflow=None)
            handle.remove()
        assert_same(seen["fusedopt"], seen["stock"])
        assert len(seen["stock"]) == 5

    def test_a_scaler_of_somebody_else_s_inside(self) -> None:
        class Own(torch.amp.GradScaler):
            unscaled = 0

            def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
                self.unscaled += 1
                super().unscale_(optimizer)

        ours, stock = Training("fusedoptadamw"), Training("adamw")
        for training in (ours, stock):
            training.scaler._scaler = Own("cpu")
        fuse(ours.scaler)
        assert_same(ours.run(0.1), stock.run(0.1))
        assert type(ours.scaler._scaler) is Own
        assert ours.scaler._scaler.unscaled == stock.scaler._scaler.unscaled == 20

    def test_two_optimizers(self) -> None:
        """timm's scaler steps one; the other's gradients are there, and clipped with them."""
        weights = []
        for cls, own in ((fusedopt.FusedAdamW, {}), (torch.optim.AdamW, STOCK)):
            model, scaler = make_model(), make_scaler(cls is fusedopt.FusedAdamW)
            params = list(model.parameters())
            one, other = cls(params[:4], lr=2e-3, **own), cls(params[4:], lr=2e-3, **own)
            for images, labels in batches(5):
                scaler(functional.cross_entropy(model(images), labels), one, 0.1, "norm", params)
                other.step()
                model.zero_grad()
            weights.append(params)
        assert_same(*weights)

    def test_no_bound(self) -> None:
        ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
        assert_same(ours.run(0.0), stock.run(0.0))

    def test_without_a_scaler(self) -> None:
        """As timm's training script does without AMP, or with bfloat16."""
        weights = []
        for name in ("fusedoptadamw", "adamw"):
            training = Training(name)
            for images, labels in batches(20):
                functional.cross_entropy(training.model(images), labels).backward()
                dispatch_clip_grad(training.model.parameters(), 0.1)
                training.optimizer.step()
                training.optimizer.zero_grad()
            weights.append(list(training.model.parameters()))
        assert_same(*weights)

    def test_without_a_scaler_the_optimizer_may_clip(self) -> None:
        ours, stock = Training("fusedoptadamw", clip_grad={"max_norm": 0.1}), Training("adamw")
        for training in (ours, stock):
            for images, labels in batches(20):
                functional.cross_entropy(training.model(images), labels).backward()
                if training is stock:
                    dispatch_clip_grad(training.model.parameters(), 0.1)
                training.optimizer.step()
                training.optimizer.zero_grad()
        assert_same(list(ours.model.parameters()), list(stock.model.parameters()))


class TestFuse:
    def test_it_is_the_same_object_and_can_be_undone(self) -> None:
        scaler = NativeScaler("cpu")
        inner, state = scaler._scaler, copy.deepcopy(scaler.state_dict())
        for _ in range(2):
            assert fuse(scaler) is scaler
            assert type(scaler) is FusedNativeScaler and isinstance(scaler, NativeScaler)
            assert scaler._scaler is inner and type(inner) is GradScaler
        for _ in range(2):
            assert unfuse(scaler) is scaler
            assert type(scaler) is NativeScaler and type(inner) is torch.amp.GradScaler
        assert scaler._scaler is inner and scaler.state_dict() == state

    def test_in_the_middle_of_a_run(self) -> None:
        ours, stock = Training("fusedoptadamw"), Training("adamw")

        def switch(step: int) -> None:
            (unfuse if step % 10 == 9 else fuse if step % 10 == 4 else lambda scaler: None)(ours.scaler)

        assert_same(ours.run(0.1, after=switch), stock.run(0.1))
        assert ours.scaler.state_dict() == stock.scaler.state_dict()

    @pytest.mark.parametrize(("clip_grad", "mode"), CLIPS)
    def test_a_stock_optimizer_is_left_alone(self, clip_grad: float | None, mode: str) -> None:
        beside, stock = Training("adamw", fused=True), Training("adamw")
        assert_same(beside.run(clip_grad, mode), stock.run(clip_grad, mode), 0)
        assert beside.passes == stock.passes
        assert beside.scaler.state_dict() == stock.scaler.state_dict()

    def test_without_fuse_a_fused_optimizer_is_right(self) -> None:
        ours, stock = Training("fusedoptadamw"), Training("adamw")
        assert_same(ours.run(0.1), stock.run(0.1))
        assert ours.passes

    def test_a_scaler_that_is_switched_off(self) -> None:
        ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
        for training in (ours, stock):
            training.scaler._scaler._enabled = False
        assert_same(ours.run(0.1, overflow=None), stock.run(0.1, overflow=None))
        assert not ours.passes

    @pytest.mark.parametrize(
        "scaler", [ApexScaler(), type("Own", (NativeScaler,), {})("cpu"), torch.amp.GradScaler("cpu")]
    )
    def test_another_scaler_is_refused(self, scaler: Any) -> None:
        with pytest.raises(TypeError, match=rf"takes a timm.utils.NativeScaler, got {type(scaler).__name__}$"):
            fuse(scaler)
        before = type(scaler)
        assert unfuse(scaler) is scaler and type(scaler) is before

    def test_no_scaler_is_refused_with_what_to_do(self) -> None:
        with pytest.raises(TypeError, match="got NoneType; without a loss scaler, give the optimizer clip_grad="):
            fuse(None)

    def test_copies(self) -> None:
        scaler = fuse(NativeScaler("cpu"))
        for copied in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
            assert type(copied) is FusedNativeScaler and type(copied._scaler) is GradScaler


class TestHostileUses:
    def test_an_optimizer_that_clips_by_itself(self) -> None:
        training = Training("fusedoptadamw", True, clip_grad={"max_norm": 1.0})
        before = copy.deepcopy(list(training.model.parameters()))
        with pytest.raises(ValueError, match="the trainer clips, and FusedAdamW has clip_grad"):
            training.run(0.1)
        assert_same(list(training.model.parameters()), before, 0)
        training.optimizer.zero_grad()
        training.run(None)  # by itself alone

    @pytest.mark.parametrize("fused", [True, False])
    def test_clip_grad_without_parameters(self, fused: bool) -> None:
        with pytest.raises(AssertionError):
            Training("fusedoptadamw", fused).run(0.1, parameters=lambda model: None)

    @pytest.mark.parametrize("fused", [True, False])
    def test_an_unknown_mode(self, fused: bool) -> None:
        with pytest.raises(AssertionError, match="Unknown clip mode"):
            Training("fusedoptadamw", fused).run(0.1, "nrom")

    def test_a_step_of_somebody_else_s_afterwards_is_not_clipped(self) -> None:
        ours, stock = Training("fusedoptadamw", fused=True), Training("adamw")
        for training in (ours, stock):
            training.run(0.1, steps=3, overflow=None)
            for param in training.model.parameters():
                param.grad = torch.ones_like(param)
            training.optimizer.step()
        assert ours.optimizer.last_step.grad_norm is None
        assert_same(list(ours.model.parameters()), list(stock.model.parameters()))


def test_without_timm_one_sentence() -> None:
    code = "import sys; sys.modules['timm'] = None; import fusedopt.integrations.timm"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "timm is not installed; install it with: pip install 'fusedopt[timm]'" in done.stderr.splitlines()[-1]


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    runpy.run_path(str(REPOSITORY / "examples" / "timm_digits.py"), run_name="__main__")
    steps, result = capsys.readouterr().out.splitlines()
    assert steps.startswith("115 steps of FusedAdamW, the last with a gradient norm of ")
    assert 85 < float(result.split()[-2]) <= 100
