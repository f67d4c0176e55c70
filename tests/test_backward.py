"""An optimizer for each parameter, which steps inside the backward pass and frees the gradient."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt.amp import GradScaler

REPOSITORY = Path(__file__).resolve().parent.parent
INF = float("inf")
STOCK = {"foreach": False, "fused": False}
TWINS = [(fusedopt.FusedAdamW, torch.optim.AdamW, 2e-3), (fusedopt.FusedSGD, torch.optim.SGD, 1e-3)]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()


def losses(model: nn.Module, overflow: int | None = None) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        loss = 10 * model(torch.randn(8, 6, dtype=torch.float64, generator=generator)).square().mean()
        yield loss * INF if step == overflow else loss


def hook(model: nn.Module, act: Callable[[Any], object]) -> None:
    def act_and_free(param: Tensor) -> None:
        act(param)
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(act_and_free)


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for param, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cls", "stock_cls", "lr"), TWINS)
@pytest.mark.parametrize("clip_value", [None, 0.02])
def test_the_weights_are_those_of_steps_after_the_backward_pass(
    cls: Any, stock_cls: Any, lr: float, clip_value: float | None
) -> None:
    clip = None if clip_value is None else dict(type="value", clip_value=clip_value)
    model, expected = make_model(), make_model()
    optimizers = {param: cls([param], lr=lr, clip_grad=clip) for param in model.parameters()}
    held = []

    def step(param: Tensor) -> None:
        held.append(sum(each.grad is not None for each in model.parameters()))
        optimizers[param].step()

    hook(model, step)
    stock = stock_cls(expected.parameters(), lr=lr, **STOCK)
    for loss, other in zip(losses(model), losses(expected), strict=True):
        loss.backward()
        stock.zero_grad()
        other.backward()
        if clip_value is not None:
            nn.utils.clip_grad_value_(expected.parameters(), clip_value)
        stock.step()
    assert_same(model, expected)
    assert held == [1] * (20 * len(optimizers))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, INF])
def test_a_norm_from_a_first_pass_clips_and_skips_as_one_optimizer_does(max_norm: float, scaled: bool) -> None:
    model, expected = make_model(), make_model()
    overflow = 7 if scaled else None
    clip = dict(max_norm=max_norm)
    optimizers = {param: fusedopt.FusedAdamW([param], lr=2e-3, clip_grad=clip) for param in model.parameters()}
    scaler = GradScaler("cpu", init_scale=8.0, enabled=scaled)
    norm: Tensor | None = None
    squares: list[Tensor] = []

    def find_norm_or_step(param: Tensor) -> None:
        if norm is None:
            squares.append(param.grad.square().sum())
        else:
            scaler.step(optimizers[param], grad_norm=norm)

    hook(model, find_norm_or_step)
    stock = torch.optim.AdamW(expected.parameters(), lr=2e-3, **STOCK)
    stock_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    clipped = 0
    for loss, other in zip(losses(model, overflow), losses(expected, overflow), strict=True):
        scaler.scale(loss).backward(retain_graph=True)
        norm = torch.stack(squares).sum().sqrt() / scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.update()
        stock.zero_grad()
        stock_scaler.scale(other).backward()
        stock_scaler.unscale_(stock)
        want = nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        stock_scaler.step(stock)
        stock_scaler.update()
        torch.testing.assert_close(norm, want, equal_nan=True)
        clipped += float(norm) > 0.5
        norm = None
        squares.clear()
    assert_same(model, expected)
    assert clipped > 5
    assert scaler.state_dict() == stock_scaler.state_dict()
    if scaled:
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_with_a_scaler_each_decides_by_itself_as_with_torch_s(kind: Any) -> None:
    """Of two layers, the gradients of the first overflow: only those of the first are kept from stepping."""
    models = [make_model(), make_model()]
    scalers = [kind("cpu", init_scale=8.0), torch.amp.GradScaler("cpu", init_scale=8.0)]
    for model, scaler, cls, own in zip(
        models, scalers, (fusedopt.FusedAdamW, torch.optim.AdamW), ({}, STOCK), strict=True
    ):
        optimizers = {param: cls([param], lr=2e-3, **own) for param in model.parameters()}
        hook(model, lambda param, scaler=scaler, optimizers=optimizers: scaler.step(optimizers[param]))
        start = [param.detach().clone() for param in model.parameters()]
        for step in range(5):
            hidden = model[1](model[0](torch.ones(8, 6, dtype=torch.float64)))
            if step == 0:
                hidden.register_hook(lambda grad: grad * INF)
            scaler.scale(model[2:](hidden).square().mean()).backward()
            scaler.update()
            if step == 0:
                changed = [not torch.equal(*pair) for pair in zip(model.parameters(), start, strict=True)]
                assert changed == [False] * 2 + [True] * (len(start) - 2)
                assert scaler.get_scale() == 4.0
    assert_same(*models)


def test_a_parameter_that_is_used_twice_is_stepped_once_with_the_sum() -> None:
    weights = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        optimizer = fusedopt.FusedAdamW([weight], lr=0.1)
        steps = []

        def step(param: Tensor, optimizer: Any = optimizer, steps: list[int] = steps) -> None:
            optimizer.step()
            steps.append(1)
            param.grad = None

        if in_backward:
            weight.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            (torch.tanh(torch.ones(2, 4, dtype=torch.float64) @ weight) @ weight).sum().backward()
            if not in_backward:
                optimizer.step()
                weight.grad = None
        assert len(steps) == (3 if in_backward else 0)
        weights.append(weight)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_what_the_backward_pass_still_needs_is_missed() -> None:
    """The step tells autograd that it has changed the parameter, so nobody computes with the new value."""
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = fusedopt.FusedAdamW([weight], lr=0.1)
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (torch.tanh(x @ weight.detach()) @ weight).sum().backward()


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    runpy.run_path(str(REPOSITORY / "examples" / "optimizer_in_backward.py"), run_name="__main__")
    held, result = capsys.readouterr().out.splitlines()
    assert held == "8 optimizers; at most 65,536 of 170,536 bytes of gradients at a time"
    assert float(result.split()[-1].rstrip("%")) > 90
