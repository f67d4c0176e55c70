"""Clipping that a trainer asks of the next step alone: Note [Clipping the next step]."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from cases import HAS_EMULATOR, INF, bits, parameters, set_gradients, state_bits
from torch import nn

import fusedopt
from fusedopt.amp import GradScaler
from fusedopt.optimizers.next_step import clip_next_step
from fusedopt.rules import NormClip, ValueClip

SHAPES = [(7,), (3, 5), (), (0,), (33,)]
BACKENDS = ["native", "reference", *(["emulated"] if HAS_EMULATOR else [])]
NORM, VALUE = NormClip(0.5), ValueClip(0.05)


def make(backend: str = "auto", **settings: Any) -> tuple[fusedopt.FusedAdamW, list[nn.Parameter]]:
    params = parameters(SHAPES, torch.float64)
    return fusedopt.FusedAdamW(params, lr=0.05, backend=backend, **settings), params


def clip_stock(params: list[nn.Parameter], clip: NormClip | ValueClip) -> torch.Tensor | None:
    params = [param for param in params if param.numel()]
    if isinstance(clip, NormClip):
        return torch.nn.utils.clip_grad_norm_(params, clip.max_norm, clip.norm_type)
    torch.nn.utils.clip_grad_value_(params, clip.clip_value)
    return None


class Stock:
    """The same training by torch's for-loop optimizer."""

    def __init__(self) -> None:
        self.params = parameters(SHAPES, torch.float64)
        self.optimizer = torch.optim.AdamW(self.params, lr=0.05, foreach=False)

    def step(self, seed: int, *clips: NormClip | ValueClip) -> list[torch.Tensor | None]:
        set_gradients(self.params, seed)
        norms = [clip_stock(self.params, clip) for clip in clips]
        self.optimizer.step()
        return norms


def assert_same(params: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("clip", [NORM, NormClip(0.2, 1.0), NormClip(0.1, INF), NormClip(INF), VALUE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_one_step_and_no_other(backend: str, clip: NormClip | ValueClip) -> None:
    optimizer, params = make(backend)
    stock = Stock()
    for seed, clips in enumerate([[clip], [], [clip]]):
        set_gradients(params, seed)
        norms = [clip_next_step(optimizer, each) for each in clips]
        optimizer.step()
        for norm, want in zip(norms, stock.step(seed, *clips), strict=True):
            assert (norm is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(norm.clone(), want)
        assert_same(params, stock.params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_may_be_read_before_the_step_and_spares_it_a_pass(backend: str) -> None:
    (early, one), (late, other) = make(backend), make(backend)
    for seed in range(3):
        for optimizer, params in ((early, one), (late, other)):
            set_gradients(params, seed)
            norm = clip_next_step(optimizer, NORM)
            if optimizer is early:
                found = norm.item()
            optimizer.step()
        assert found == early.last_step.grad_norm == norm
        torch.testing.assert_close(early.last_step.clip_coef, late.last_step.clip_coef)
        assert_same(one, other)


def test_the_norm_is_a_tensor_like_any_other() -> None:
    optimizer, params = make()
    set_gradients(params, 0)
    norm = clip_next_step(optimizer, NORM)
    optimizer.step()
    want = optimizer.last_step.grad_norm
    assert isinstance(norm, torch.Tensor)
    assert (norm.item(), float(norm), norm.tolist(), math.sqrt(norm)) == (want, want, want, math.sqrt(want))
    assert (norm.shape, norm.dtype, norm.device, norm.ndim) == (want.shape, want.dtype, want.device, 0)
    assert f"{norm:.3f}" == f"{want:.3f}" and repr(norm) == repr(want)
    assert bool(norm > 0) and not norm.isnan()
    assert torch.stack([norm, norm]).tolist() == [want, want]
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm.clone(), norm.detach().cpu()):
        assert copied == want
    norm.zero_()  # theirs, not ours
    assert optimizer.last_step.grad_norm == want != 0


@pytest.mark.parametrize("read", [True, False])
def test_it_is_a_plain_tensor_as_soon_as_it_is_found(read: bool) -> None:
    """wandb logs what has a class of a name like ``torch.Tensor``; ``nn.Parameter`` takes no subclass of ours."""
    optimizer, params = make()
    set_gradients(params, 0)
    norm = clip_next_step(optimizer, NORM)
    if read:
        norm.item()
        assert type(norm) is torch.Tensor
    optimizer.step()
    assert type(norm) is torch.Tensor and not vars(norm)
    assert norm == optimizer.last_step.grad_norm


def test_its_memory_holds_the_norm_when_that_is_found_and_no_other_number_before() -> None:
    """torch.distributed's collectives read and write it, and ask no subclass."""
    optimizer, params = make()
    set_gradients(params, 0)
    norm = clip_next_step(optimizer, NORM)
    with torch._C.DisableTorchFunctionSubclass():
        assert math.isnan(torch.as_tensor(norm).item())
    optimizer.step()
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.as_tensor(norm).item() == optimizer.last_step.grad_norm
        norm.mul_(2.0)
    assert norm == 2 * optimizer.last_step.grad_norm


@pytest.mark.parametrize("clips", [(NORM, VALUE), (VALUE, NORM), (NormClip(INF), NORM), (NORM, NormClip(INF))])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_clipping_twice_clips_what_was_clipped(clips: Any, scale: float | None) -> None:
    optimizer, params = make()
    stock = Stock()
    set_gradients(params, 0)
    factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    if scale is not None:
        for param in params:
            param.grad.mul_(scale)
    norms = [clip_next_step(optimizer, clip, factor) for clip in clips]
    optimizer.step(grad_scale=factor)
    for norm, want in zip(norms, stock.step(0, *clips), strict=True):
        if want is not None:
            torch.testing.assert_close(norm.clone(), want)
    assert_same(params, stock.params)


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_an_overflow_skips_and_the_next_step_is_clipped_as_it_was_told(kind: Any) -> None:
    optimizer, params = make()
    scaler = kind("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    before = bits(params)
    set_gradients(params, 0)
    params[1].grad[0, 0] = INF
    norm = clip_next_step(optimizer, NORM, scaler._get_scale_async())
    scaler.step(optimizer)
    scaler.update()
    assert norm.isinf() and bits(params) == before and scaler.get_scale() == 4.0
    stock = Stock()
    for seed in range(2):
        set_gradients(params, seed)
        for param in params:
            param.grad.mul_(4.0)
        clips = [NORM] if seed else []
        for clip in clips:
            clip_next_step(optimizer, clip, scaler._get_scale_async())
        scaler.step(optimizer)
        scaler.update()
        stock.step(seed, *clips)
    assert_same(params, stock.params)


@pytest.mark.parametrize("read", ["after the step", "before unscaling", "after unscaling"])
@pytest.mark.parametrize("clips", [(NORM,), (VALUE,), (NORM, VALUE), (VALUE, NORM)])
def test_gradients_may_be_unscaled_between_the_clipping_and_the_step(clips: Any, read: str) -> None:
    """torch's unscaling does not count as a change of the gradients, but what is read or clipped then has no scale."""
    optimizer, params = make()
    stock = Stock()
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for seed in range(2):
        set_gradients(params, seed)
        for param in params:
            param.grad.mul_(8.0)
        norms = [clip_next_step(optimizer, clips[0], scaler._get_scale_async())]
        if read == "before unscaling" and norms[0] is not None:
            float(norms[0])
        scaler.unscale_(optimizer)
        if read == "after unscaling" and norms[0] is not None:
            float(norms[0])
        norms += [clip_next_step(optimizer, clip) for clip in clips[1:]]
        scaler.step(optimizer)
        scaler.update()
        for norm, want in zip(norms, stock.step(seed, *clips), strict=True):
            if want is not None:
                torch.testing.assert_close(norm.clone(), want)
        assert_same(params, stock.params)


def test_unscaling_does_not_excuse_gradients_that_were_written_to() -> None:
    optimizer, params = make()
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    set_gradients(params, 0)
    clip_next_step(optimizer, NORM, scaler._get_scale_async())
    params[0].grad.add_(1.0)
    with pytest.raises(RuntimeError, match="written to"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_a_scaler_finds_the_overflow_that_was_clipped_by_value_twice(kind: Any) -> None:
    optimizer, params = make()
    scaler = kind("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    before = bits(params)
    for sign in (1, -1):
        set_gradients(params, 0)
        params[1].grad[0, 0] = sign * INF
        clip_next_step(optimizer, VALUE, scaler._get_scale_async())
        clip_next_step(optimizer, NORM, scaler._get_scale_async())
        scaler.step(optimizer)
        scaler.update()
        assert bits(params) == before
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("read", [False, True])
def test_a_norm_that_is_not_finite_is_an_error_of_the_step(read: bool) -> None:
    optimizer, params = make()
    before = bits(params)
    set_gradients(params, 0)
    params[1].grad[0, 0] = INF
    norm = clip_next_step(optimizer, NormClip(0.5, error_if_nonfinite=True))
    assert not read or norm.isinf()
    with pytest.raises(RuntimeError, match="is inf, so"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="is inf, so"):
        clip_next_step(optimizer, NORM)
    assert bits(params) == before


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_but_not_if_a_scaler_skips_the_step(read: bool, unscaled: bool) -> None:
    optimizer, params = make()
    before = bits(params)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    set_gradients(params, 0)
    params[1].grad[0, 0] = INF
    if unscaled:
        scaler.unscale_(optimizer)
    scale = None if unscaled else scaler._get_scale_async()
    norm = clip_next_step(optimizer, NormClip(0.5, error_if_nonfinite=True), scale)
    assert not read or norm.isinf()
    scaler.step(optimizer)
    scaler.update()
    assert bits(params) == before and norm.isinf() and scaler.get_scale() == 4.0


class TestWithoutAStep:
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad_drops_it_and_the_norm_can_still_be_read(self, set_to_none: bool) -> None:
        optimizer, params = make()
        stock = Stock()
        set_gradients(params, 7)
        want = torch.nn.utils.get_total_norm([param.grad for param in params])
        norm = clip_next_step(optimizer, NORM)
        optimizer.zero_grad(set_to_none)
        torch.testing.assert_close(norm.clone(), want)
        set_gradients(params, 0)
        optimizer.step()
        stock.step(0)
        assert_same(params, stock.params)

    def test_nobody_who_has_the_norm_no_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        optimizer, params = make()
        set_gradients(params, 0)
        clip_next_step(optimizer, NORM)
        gc.collect()
        monkeypatch.setattr(optimizer, "_served", None)
        optimizer.zero_grad()

    def test_other_gradients_are_refused(self) -> None:
        """They may be a sum with those that were to be clipped, as a backward pass with create_graph leaves it."""
        optimizer, params = make()
        before = bits(params)
        set_gradients(params, 7)
        norm = clip_next_step(optimizer, NormClip(1e-3))
        for param in params:
            param.grad = None
        optimizer.step()  # of nothing
        clip_next_step(optimizer, NormClip(1e-3))
        set_gradients(params, 0)
        with pytest.raises(RuntimeError, match="thrown away"):
            norm.item()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="was told to clip other gradients than it has now"):
                optimizer.step()
        assert bits(params) == before
        optimizer.zero_grad()
        stock = Stock()
        for seed, clips in enumerate([[], [NORM]]):
            set_gradients(params, seed)
            for clip in clips:
                clip_next_step(optimizer, clip)
            optimizer.step()
            stock.step(seed, *clips)
        assert_same(params, stock.params)

    def test_clipping_again_is_of_the_gradients_that_are_there(self) -> None:
        optimizer, params = make()
        stock = Stock()
        for clip in (NormClip(1e-3), NORM):
            for param in params:  # as model.zero_grad()
                param.grad = None
            set_gradients(params, 0)
            clip_next_step(optimizer, clip)
        optimizer.step()
        stock.step(0, NORM)
        assert_same(params, stock.params)

    @pytest.mark.parametrize("i", [0, -1], ids=["first", "last"])
    def test_gradients_that_were_written_to_are_refused(self, i: int) -> None:
        optimizer, params = make()
        set_gradients(params, 0)
        optimizer.step()
        before = bits(params), state_bits(optimizer)
        clip_next_step(optimizer, NORM)
        params[i].grad.add_(1.0)
        with pytest.raises(RuntimeError, match="FusedAdamW is to clip gradients that somebody has written to"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="written to"):
            clip_next_step(optimizer, NORM)
        assert (bits(params), state_bits(optimizer)) == before
        optimizer.zero_grad()
        set_gradients(params, 1)
        optimizer.step()
        assert (bits(params), state_bits(optimizer)) != before

    @pytest.mark.parametrize("i", [0, -1], ids=["first", "last"])
    @pytest.mark.parametrize("there", [True, False])
    def test_a_gradient_that_was_replaced_is_refused(self, i: int, there: bool) -> None:
        """As where the last layer is not trained for a while, and loses its gradient after the clipping."""
        optimizer, params = make()
        set_gradients(params, 0)
        clip_next_step(optimizer, NORM)
        before = bits(params)
        params[i].grad = torch.ones_like(params[i]) if there else None
        for call in (optimizer.step, lambda: clip_next_step(optimizer, NORM)):
            with pytest.raises(RuntimeError, match="FusedAdamW was told to clip other gradients than it has now"):
                call()
        assert bits(params) == before

    def test_a_failed_step_is_clipped_when_it_is_made_again(self) -> None:
        optimizer, params = make()
        stock = Stock()
        set_gradients(params, 0)
        norm = clip_next_step(optimizer, NORM)
        shape, params[1].grad = params[1].grad, None
        params[1].data, whole = params[1].data[:2], params[1].data
        params[1].grad = shape[:2].clone()
        params[1].data = whole
        with pytest.raises(RuntimeError, match="shape"):
            optimizer.step()
        params[1].grad = shape
        optimizer.step()
        (want,) = stock.step(0, NORM)
        torch.testing.assert_close(norm.clone(), want)
        assert_same(params, stock.params)


def test_an_optimizer_that_clips_by_itself_is_refused() -> None:
    optimizer, _ = make(clip_grad=dict(max_norm=1.0))
    with pytest.raises(ValueError, match=r"the trainer clips, and FusedAdamW has clip_grad=.*max_norm"):
        clip_next_step(optimizer, NORM)


def test_a_group_is_not_stepped_with_a_member_that_a_trainer_clips() -> None:
    optimizer, params = make()
    group = fusedopt.ClipGroup([optimizer], max_norm=1.0)
    set_gradients(params, 0)
    clip_next_step(optimizer, NORM)
    with pytest.raises(ValueError, match=r"a trainer clips optimizers\[0\]"):
        group.step()


def test_a_closure_may_ask_for_it() -> None:
    optimizer, params = make()
    stock = Stock()

    def closure() -> float:
        optimizer.zero_grad()
        set_gradients(params, 3)
        clip_next_step(optimizer, NORM)
        return 1.0

    assert optimizer.step(closure) == 1.0
    stock.step(3, NORM)
    assert_same(params, stock.params)


def test_copies_do_not_clip() -> None:
    optimizer, params = make()
    set_gradients(params, 0)
    clip_next_step(optimizer, NORM)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for param, own in zip(copied.param_groups[0]["params"], params, strict=True):
            param.grad = own.grad.clone()
        copied.step()
        assert copied.last_step.grad_norm is None
