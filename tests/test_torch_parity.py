"""The same trajectories, state dicts and behaviour as torch's own optimizers."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import BACKENDS, OPTIONS, SMALL, backend_name, bits, each_backend, parameters, set_gradients, state_bits
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fusedopt
from fusedopt.optimizers import FUSED_TWINS

STOCK = {fused: stock for stock, fused in FUSED_TWINS.items()}
each_option = pytest.mark.parametrize("option", [name for name, (cls, _) in OPTIONS.items() if cls in STOCK])

#: Over 200 steps our trajectory stays within this many units in the last place of torch's, measured at the largest
#: parameter value of a tensor: both round at each step, and Adam divides by a root that amplifies a rounding.
ULPS = 64


def twins(option: str, params: list[nn.Parameter]) -> tuple[Any, Any, list[Any]]:
    """A stock for-loop optimizer on copies of the parameters, and the fused one: (stock, fused, stock's parameters)."""
    cls, settings = OPTIONS[option]
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    return STOCK[cls](copies, **settings, foreach=False), cls(params, **settings), copies


def step_both(stock: Any, fused: Any, copies: list[Any], params: list[Any], seed: int) -> None:
    set_gradients(params, seed)
    for copied, param in zip(copies, params, strict=True):
        copied.grad = None if param.grad is None else param.grad.clone()
    stock.step()
    fused.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@each_option
def test_many_steps_stay_with_torchs_for_loop(option: str, dtype: torch.dtype, thorough: bool) -> None:
    steps = 200 if thorough else 60
    cls, settings = OPTIONS[option]
    start = parameters(SMALL, dtype)
    copies = [nn.Parameter(param.detach().clone()) for param in start]
    stock = STOCK[cls](copies, **settings, foreach=False)
    # torch calculates with a float32 tensor's own precision, also for float64 parameters.
    precision = torch.float32 if "tensor" in option else dtype
    fused = []
    for backend in BACKENDS:
        params = [nn.Parameter(param.detach().clone()) for param in start]
        fused.append((backend, params, cls(params, **settings, backend=backend_name(backend))))
    for step in range(steps):
        set_gradients(copies, step)
        stock.step()
        for backend, params, optimizer in fused:
            if backend == "triton" and step >= 12:  # interpreted, 200 take a minute
                continue
            backend_name(backend)
            for copied, param in zip(copies, params, strict=True):
                param.grad = copied.grad
            optimizer.step()
        if step not in (11, steps - 1):
            continue
        for backend, params, _ in fused:
            if backend == "triton" and step > 11:
                continue
            for copied, param in zip(copies, params, strict=True):
                if param.numel():
                    unit = torch.finfo(precision).eps * param.detach().abs().max()
                    error = ((param - copied).detach().abs().max() / unit).item()
                    assert error <= ULPS, f"{backend}: {error} ulp for shape {tuple(param.shape)}"


@each_backend
def test_nan_stays_in_the_maximum_of_amsgrad_as_in_torch(backend: str) -> None:
    params, copies = ([nn.Parameter(torch.ones(3))] for _ in range(2))
    fused = fusedopt.FusedAdamW(params, amsgrad=True, backend=backend_name(backend))
    stock = torch.optim.AdamW(copies, amsgrad=True, foreach=False)
    for grad in ([1.0, math.nan, 2.0], [0.5, 0.5, 0.5]):
        params[0].grad, copies[0].grad = torch.tensor(grad), torch.tensor(grad)
        fused.step()
        stock.step()
    got, want = fused.state[params[0]]["max_exp_avg_sq"], stock.state[copies[0]]["max_exp_avg_sq"]
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got.isnan().tolist() == [False, True, False]


@each_option
def test_state_dict_has_torchs_layout(option: str) -> None:
    params = parameters(SMALL)
    stock, fused, copies = twins(option, params)
    step_both(stock, fused, copies, params, 0)
    ours, theirs = fused.state_dict(), stock.state_dict()
    assert [list(group) for group in ours["param_groups"]] == [list(group) for group in theirs["param_groups"]]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert {name: (value.dtype, value.shape) for name, value in ours["state"][key].items()} == {
            name: (value.dtype, value.shape) for name, value in state.items()
        }
    assert fused.defaults.keys() == stock.defaults.keys()


@each_option
def test_state_goes_both_ways_mid_training_bit_for_bit(option: str) -> None:
    params = parameters(SMALL)
    stock, fused, copies = twins(option, params)
    for step in range(3):
        step_both(stock, fused, copies, params, step)

    stock.load_state_dict(copy.deepcopy(fused.state_dict()))  # torch's load shares memory with what it loads
    assert state_bits(stock) == state_bits(fused)
    step_both(stock, fused, copies, params, 3)

    fused.load_state_dict(stock.state_dict())
    assert state_bits(fused) == state_bits(stock)
    step_both(stock, fused, copies, params, 4)
    for copied, param in zip(copies, params, strict=True):
        torch.testing.assert_close(param, copied, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy"])
@each_option
def test_resume_mid_training_is_bit_identical(option: str, how: str) -> None:
    cls, settings = OPTIONS[option]
    params = parameters(SMALL)
    optimizer = cls(params, **settings, clip_grad={"max_norm": 0.5}, write_back_grads=True)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()

    if how == "torch.save":
        file = io.BytesIO()
        torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        resumed_params = saved["params"]
        resumed = cls(resumed_params, **settings, clip_grad={"max_norm": 0.5}, write_back_grads=True)
        resumed.load_state_dict(saved["optimizer"])
    else:
        both = [optimizer, params]
        resumed, resumed_params = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        assert resumed.clip_grad == optimizer.clip_grad
        assert resumed.write_back_grads
    for step in range(3, 6):
        set_gradients(params, step)
        set_gradients(resumed_params, step)
        optimizer.step()
        resumed.step()
    assert bits(resumed_params) == bits(params)
    assert state_bits(resumed) == state_bits(optimizer)


def test_a_loaded_state_dict_is_copied() -> None:
    params = parameters(SMALL)
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    other = fusedopt.FusedAdamW(parameters(SMALL))
    other.load_state_dict(saved)
    before = state_bits(optimizer)
    set_gradients(other.param_groups[0]["params"], 1)
    other.step()
    assert state_bits(optimizer) == before


def test_state_dtypes_survive_loading() -> None:
    """pytorch#75224: torch casts moments to the parameter's dtype."""
    params = parameters(SMALL, torch.bfloat16)
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float()
        state["exp_avg_sq"] = state["exp_avg_sq"].float()
    other = fusedopt.FusedAdamW(params)
    other.load_state_dict(optimizer.state_dict())
    assert all(state["exp_avg_sq"].dtype == torch.float32 for state in other.state.values())
    assert state_bits(other) == state_bits(optimizer)


def test_load_hooks_see_and_may_replace_the_dict() -> None:
    params = parameters([(3,)])
    optimizer = fusedopt.FusedSGD(params, lr=0.1)
    calls = []

    def pre_hook(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        replaced = copy.deepcopy(state_dict)
        replaced["param_groups"][0]["lr"] = 0.7
        return replaced

    optimizer.register_load_state_dict_pre_hook(pre_hook)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(opt.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [0.7]


def test_step_hooks_run_around_the_step() -> None:
    params = parameters([(3,)])
    optimizer = fusedopt.FusedSGD(params, lr=0.1)
    set_gradients(params, 0)
    calls: list[Any] = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("pre", params[0].detach().clone())))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("post", params[0].detach().clone())))
    optimizer.step()
    assert [name for name, _ in calls] == ["pre", "post"]
    assert not torch.equal(calls[0][1], calls[1][1])
    pre.remove()
    optimizer.step()
    assert [name for name, _ in calls] == ["pre", "post", "post"]
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append(("global", None)))
    try:
        optimizer.step()
    finally:
        everywhere.remove()
    assert [name for name, _ in calls[3:]] == ["post", "global"]


def test_a_pre_hook_may_replace_the_closure() -> None:
    params = parameters([(3,)])
    optimizer = fusedopt.FusedSGD(params, lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {**kwargs, "closure": lambda: 2.0}))
    assert optimizer.step(closure=lambda: 1.0) == 2.0
    assert optimizer.step() == 2.0


def test_state_that_was_reset_by_hand_is_saved() -> None:
    """Only state as it is created is left out; zeroing `step` to restart bias correction keeps the moments."""
    params = parameters([(3,)])
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["step"].zero_()
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {"all": state_dict}, prepend=True)
    assert set(optimizer.state_dict()) == {"all"}


def test_lazy_parameters_become_real_before_the_first_step() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))
    optimizer = fusedopt.FusedAdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    before = bits(model.parameters())
    optimizer.step()
    assert all(a != b for a, b in zip(before, bits(model.parameters()), strict=True))


def test_the_profiler_sees_the_step() -> None:
    params = parameters([(3,)])
    optimizer = fusedopt.FusedSGD(params, lr=0.1)
    set_gradients(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch itself, in some versions
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
    assert any("Optimizer.step#FusedSGD.step" in event.key for event in profile.key_averages())


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    model = nn.Linear(4, 1)
    optimizer = fusedopt.FusedAdamW(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        second = optimizer.step(closure)
    assert second < first


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR of torch 2.8 passes it
def test_schedulers_drive_the_optimizer_without_warnings() -> None:
    params = parameters(SMALL)
    stock, fused, copies = twins("adamw", params)
    schedulers = [
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            ],
            [5],
        )
        for optimizer in (stock, fused)
    ]
    for step in range(20):
        step_both(stock, fused, copies, params, step)
        for scheduler in schedulers:
            scheduler.step()
        assert stock.param_groups[0]["lr"] == fused.param_groups[0]["lr"]
    for copied, param in zip(copies, params, strict=True):
        torch.testing.assert_close(param, copied)


def test_one_cycle_moves_the_betas() -> None:
    params = parameters(SMALL)
    stock, fused, copies = twins("adam", params)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20) for o in (stock, fused)]
    for step in range(19):
        step_both(stock, fused, copies, params, step)
        for scheduler in schedulers:
            scheduler.step()
    assert fused.param_groups[0]["betas"] == stock.param_groups[0]["betas"] != (0.9, 0.999)
    for copied, param in zip(copies, params, strict=True):
        torch.testing.assert_close(param, copied, rtol=1e-5, atol=1e-5)


@each_option
def test_fuse_takes_over_state_groups_and_schedulers(option: str) -> None:
    cls, settings = OPTIONS[option]
    params = parameters(SMALL)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    split = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    stock_split = [{"params": copies[:3]}, {"params": copies[3:], "lr": 0.02}]
    settings = {key: value for key, value in settings.items() if not isinstance(value, torch.Tensor)}
    to_fuse, stock = STOCK[cls](split, **settings), STOCK[cls](stock_split, **settings, foreach=False)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (to_fuse, stock)]

    def both(optimizer: Any, step: int) -> None:
        set_gradients(params, step)
        set_gradients(copies, step)
        optimizer.step()
        stock.step()
        for scheduler in schedulers:
            scheduler.step()

    for step in range(3):
        both(to_fuse, step)
    fused = fusedopt.fuse(to_fuse)
    assert type(fused) is cls
    assert {**fused.defaults, "foreach": None, "fused": None} == {**to_fuse.defaults, "foreach": None, "fused": None}
    assert all(ours is theirs for ours, theirs in zip(fused.param_groups, to_fuse.param_groups, strict=True))
    for step in range(3, 8):
        both(fused, step)
    assert [group["lr"] for group in fused.param_groups] == [group["lr"] for group in stock.param_groups]
    for copied, param in zip(copies, params, strict=True):
        torch.testing.assert_close(param, copied, rtol=1e-5, atol=1e-5)


def test_fuse_before_the_first_step_spares_the_schedulers_warning() -> None:
    params = parameters([(3,)])
    stock = torch.optim.AdamW(params)
    scheduler = torch.optim.lr_scheduler.StepLR(stock, 1)
    fused = fusedopt.fuse(stock)
    set_gradients(params, 0)
    fused.step()
    scheduler.step()
    assert fused.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_float64_step_mode() -> None:
    """torch keeps float64 step counts under a float64 default dtype."""
    torch.set_default_dtype(torch.float64)
    params = parameters(SMALL)
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    assert all(state["step"].dtype == torch.float64 and state["step"] == 2 for state in optimizer.state.values())


def test_named_parameters_are_accepted_and_named_in_errors() -> None:
    model = nn.Linear(3, 3)
    optimizer = fusedopt.FusedAdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model.weight.grad = torch.zeros(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="'weight'"):
        optimizer.step()


def test_post_accumulate_grad_hook_users_can_step_in_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizers = {param: fusedopt.FusedAdamW([param], lr=0.1) for param in model.parameters()}

    def step_now(param: torch.Tensor) -> None:
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_now)
    before = bits(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    assert all(a != b for a, b in zip(before, bits(model.parameters()), strict=True))


def test_version_counters_are_bumped_so_that_autograd_notices() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.FusedSGD([param], lr=0.1)
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    version = param._version
    optimizer.step()
    assert param._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_existing_flags_are_accepted_with_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedopt.optimizers.ignored._noted_ignored_flags", False)
    with pytest.warns(UserWarning, match="foreach=True has no effect"):
        fusedopt.FusedAdamW(parameters([(3,)]), foreach=True)
    fusedopt.FusedSGD(parameters([(3,)]), fused=True)
    fusedopt.FusedAdamW(parameters([(3,)]), capturable=True)
