"""Every mistake gets an error that names the parameter or key, and leaves parameters and state as they were."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKENDS, GPU, backend_name, bits, each_backend, each_optimizer, parameters, set_gradients, state_bits
from torch import nn

import fusedopt
from fusedopt import backends
from fusedopt.backends import BackendUnavailable, NativeBackend, TritonBackend, create_backend
from fusedopt.messages import check_gradient


@each_optimizer
@pytest.mark.parametrize("lr", [-1.0, math.nan, torch.tensor(-1.0), torch.tensor(math.nan)])
def test_learning_rate_out_of_range(cls: Any, lr: Any) -> None:
    with pytest.raises(ValueError, match="Invalid lr"):
        cls(parameters([(3,)]), lr=lr)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"betas": (1.0, 0.9)}, ValueError, r"Invalid betas\[0\]: 1.0; expected a number in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, ValueError, r"Invalid betas\[1\]"),
        ({"betas": (0.9, math.nan)}, ValueError, r"Invalid betas\[1\]"),
        ({"betas": 0.9}, ValueError, "Invalid betas: 0.9; expected two numbers"),
        ({"betas": (0.9, torch.tensor(0.9))}, ValueError, "both floats or both Tensors"),
        ({"eps": -1e-8}, ValueError, "Invalid eps"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay"),
        ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay"),
        ({"lr": "0.1"}, TypeError, "Invalid lr: '0.1'; expected a number"),
        ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
        ({"differentiable": True}, RuntimeError, "differentiable=True is not supported"),
        ({"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
        ({"clip_grad": {"max_norm": 0}}, ValueError, "Invalid clip_grad max_norm: 0; expected a number > 0"),
        ({"clip_grad": {"max_norm": -1.0}}, ValueError, "max_norm"),
        ({"clip_grad": {"max_norm": math.nan}}, ValueError, "max_norm"),
        ({"clip_grad": {"max_norm": "1"}}, TypeError, "max_norm"),
        ({"clip_grad": {"max_norm": 1.0, "norm_type": 0}}, ValueError, "norm_type"),
        ({"clip_grad": {"max_norm": 1.0, "norm_type": "two"}}, ValueError, "norm_type: 'two'"),
        ({"clip_grad": {"max_norm": 1.0, "norm_typ": 2}}, ValueError, "did you mean 'norm_type'"),
        ({"clip_grad": {"type": "volume", "max_norm": 1.0}}, ValueError, "unknown type 'volume'"),
        ({"clip_grad": {"norm_type": 2}}, TypeError, "needs 'max_norm'"),
        ({"clip_grad": {"type": "value"}}, TypeError, "needs 'clip_value'"),
        ({"clip_grad": {"type": "value", "clip_value": -1.0}}, ValueError, "clip_value"),
        ({"clip_grad": 1.0}, TypeError, "clip_grad must be a dict or None, got float"),
        ({"backend": "nativ"}, ValueError, "unknown backend 'nativ'; did you mean 'native'"),
    ],
)
def test_setting_out_of_range(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.FusedAdamW(parameters([(3,)]), **settings)


def test_sgd_settings() -> None:
    with pytest.raises(ValueError, match="Invalid momentum"):
        fusedopt.FusedSGD(parameters([(3,)]), momentum=-0.1)
    with pytest.raises(ValueError, match="Nesterov"):
        fusedopt.FusedSGD(parameters([(3,)]), nesterov=True)
    with pytest.raises(ValueError, match="Nesterov"):
        fusedopt.FusedSGD(parameters([(3,)]), momentum=0.9, dampening=0.1, nesterov=True)


def test_a_groups_own_settings_are_checked_too() -> None:
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        fusedopt.FusedAdamW([{"params": parameters([(3,)]), "lr": -1}])
    optimizer = fusedopt.FusedAdamW(parameters([(3,)]))
    with pytest.raises(ValueError, match="Invalid eps"):
        optimizer.add_param_group({"params": parameters([(2,)]), "eps": math.nan})
    assert len(optimizer.param_groups) == 1


def test_assigning_clip_grad_is_checked() -> None:
    optimizer = fusedopt.FusedAdamW(parameters([(3,)]), clip_grad={"max_norm": 1.0})
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad = {"max_norm": 0}
    assert optimizer.clip_grad is not None
    assert optimizer.clip_grad["max_norm"] == 1.0


@each_optimizer
def test_empty_parameter_list(cls: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])


def test_a_generator_used_twice() -> None:
    model = nn.Linear(2, 2)
    generator = model.parameters()
    fusedopt.FusedAdamW(generator)
    with pytest.raises(ValueError, match="generator"):
        fusedopt.FusedAdamW(generator)
    with pytest.raises(ValueError, match="generator that was used up before"):
        fusedopt.FusedAdamW([{"params": generator}])
    with pytest.raises(ValueError, match="generator that was used up before"):
        fusedopt.FusedAdamW(model.parameters()).add_param_group({"params": generator})


def test_a_group_may_be_empty_as_in_torch() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    trainable = parameters([(3,)])
    groups = [{"params": (p for p in model.parameters() if p.requires_grad)}, {"params": []}, {"params": trainable}]
    optimizer = fusedopt.FusedAdamW(groups)
    set_gradients(trainable, 0)
    optimizer.step()
    assert len(optimizer.state) == 1


class _Wrapper(torch.Tensor):
    """A tensor subclass with its own dispatch and no memory of its own, as DTensor is."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@each_optimizer
@pytest.mark.parametrize(
    ("param", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64, requires_grad=True), "is complex"),
        (lambda: torch.ones(3).to_sparse().requires_grad_(), "sparse layout"),
        (lambda: torch.ones(3, device="meta", requires_grad=True), "meta device"),
        (lambda: torch.ones(3, dtype=torch.int64), "dtype torch.int64"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn"),
        (lambda: _Wrapper(torch.ones(3)), "_Wrapper"),
    ],
)
def test_a_parameter_no_kernel_can_update(cls: Any, param: Any, message: str) -> None:
    fine = parameters([(3,)])[0]
    with pytest.raises(TypeError, match=rf"parameter 'b' \(param_groups\[0\]\['params'\]\[1\].*{message}"):
        cls([("a", fine), ("b", param())])
    with pytest.raises(TypeError, match=message):
        cls([fine, param()])


def test_dtensors_that_are_not_added_up_are_refused_by_name() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
        with pytest.raises(
            TypeError, match=r"'w'.*is a DTensor with placements .*Partial.*expected Shard or Replicate"
        ):
            fusedopt.FusedAdamW([("w", param)])
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh))
        fusedopt.FusedAdamW([("w", param)])
        param = nn.Parameter(DTensor.from_local(torch.ones(4, dtype=torch.complex64), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"'w'.*is complex"):
            fusedopt.FusedAdamW([("w", param)])
    finally:
        destroy_process_group()


def test_the_same_parameter_twice_is_refused() -> None:
    param = parameters([(3,)])[0]
    with pytest.raises(ValueError, match="appears twice"):
        fusedopt.FusedAdamW([param, param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        fusedopt.FusedAdamW([{"params": [param]}, {"params": [param]}])


def bad_shape(param: nn.Parameter) -> None:
    param.data = torch.zeros(7)


def sparse(param: nn.Parameter) -> None:
    param.grad = torch.ones(5).to_sparse()


def double(param: nn.Parameter) -> None:
    param.data = param.data.to(torch.complex64)


def negated(param: nn.Parameter) -> None:
    param.grad = torch._neg_view(torch.ones(5))


@each_backend
@pytest.mark.parametrize("state", ["first step", "later step"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_shape, "has shape|another shape|shape"),
        (sparse, "sparse layout"),
        (double, "complex"),
        (negated, "lazily negated view"),
    ],
)
def test_a_gradient_that_cannot_drive_an_update(backend: str, state: str, spoil: Any, message: str) -> None:
    params = parameters([(4,), (5,), (6,)])
    optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 1.0}, backend=backend_name(backend))
    set_gradients(params, 0)
    if state == "later step":
        optimizer.step()
    set_gradients(params, 1)
    spoil(params[1])
    before, state_before = bits([params[0], params[2]]), state_bits(optimizer)
    with pytest.raises((RuntimeError, TypeError), match=rf"params'\]\[1\].*({message})"):
        optimizer.step()
    assert bits([params[0], params[2]]) == before
    assert state_bits(optimizer) == state_before


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # torch's own operations crash
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("param", "has no memory"),
        ("grad", "gradient without memory"),
        ("exp_avg_sq", "state tensor without memory"),
        ("step", "step count without memory"),
    ],
)
def test_a_tensor_whose_storage_was_freed_is_named(backend: str, which: str, message: str) -> None:
    params = parameters([(4,), (5,)])
    optimizer = fusedopt.FusedAdamW(params, backend=backend_name(backend))
    set_gradients(params, 0)
    optimizer.step()
    tensors = {"param": params[1], "grad": params[1].grad, **optimizer.state[params[1]]}
    tensors[which].untyped_storage().resize_(0)
    before, state_before = bits(params[:1]), [bits([value]) for value in optimizer.state[params[0]].values()]
    with pytest.raises(RuntimeError, match=rf"params'\]\[1\].*{message}"):
        optimizer.step()
    assert bits(params[:1]) == before
    assert [bits([value]) for value in optimizer.state[params[0]].values()] == state_before


def test_a_gradient_on_another_device_is_named() -> None:
    # torch refuses to assign one; it takes `param.data = ...` or a GPU to get there.
    with pytest.raises(RuntimeError, match="gradient of parameter 'w' is on the meta device"):
        check_gradient("parameter 'w'", torch.zeros(3), torch.zeros(3, device="meta"))


@each_backend
def test_a_state_of_another_shape_is_named(backend: str) -> None:
    params = parameters([(4,), (5,)])
    optimizer = fusedopt.FusedAdamW(params, backend=backend_name(backend))
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(6)
    before = bits(params)
    if backend == "reference":
        with pytest.raises(RuntimeError):
            optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"params'\]\[1\].*state tensor"):
        optimizer.step()
    assert bits(params) == before


def test_checkpoints_that_do_not_fit() -> None:
    optimizer = fusedopt.FusedAdamW(parameters([(4,), (5,)]))
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    before = state_bits(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())

    def other(shapes: list[Any], split: bool = False) -> dict[str, Any]:
        params = parameters(shapes)
        donor = fusedopt.FusedAdamW([{"params": [p]} for p in params] if split else params)
        set_gradients(params, 0)
        donor.step()
        return donor.state_dict()

    with pytest.raises(ValueError, match="different number of parameter groups: 2, expected 1"):
        optimizer.load_state_dict(other([(4,), (5,)], split=True))
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 3 parameters, expected 2"):
        optimizer.load_state_dict(other([(4,), (5,), (6,)]))
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter.*\[1\].* has shape \(6,\), expected \(5,\)"):
        optimizer.load_state_dict(other([(4,), (6,)]))
    broken = copy.deepcopy(saved)
    broken["state"][1]["step"] = torch.tensor(-2.0)  # torch's fused AdamW leaves this after found_inf = 2, twice
    with pytest.raises(ValueError, match=r"'step' of parameter.*\[1\].* is -2; expected a count >= 0"):
        optimizer.load_state_dict(broken)
    with pytest.raises(KeyError, match="state_dict has no 'state'"):
        optimizer.load_state_dict({"param_groups": saved["param_groups"]})
    assert state_bits(optimizer) == before


def test_fuse_takes_only_what_it_knows() -> None:
    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(TypeError, match=r"torch\.optim\.AdamW, .*; got RMSprop"):
        fusedopt.fuse(torch.optim.RMSprop(parameters([(3,)])))
    with pytest.raises(TypeError, match="got Mine"):
        fusedopt.fuse(Mine(parameters([(3,)])))


def test_a_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedopt.backends.native._module", None)
    monkeypatch.setattr("fusedopt.backends.native._reason", "it is not built")
    with pytest.raises(BackendUnavailable, match="backend 'native' is not available: it is not built"):
        fusedopt.FusedAdamW(parameters([(3,)]), backend="native")
    assert fusedopt.FusedAdamW(parameters([(3,)])).backend_in_use == "reference"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that says why the backends cannot serve GPUs: None for one that can, or at least is taken for it."""

    def say(**reasons: str | None) -> None:
        for name, reason in reasons.items():
            monkeypatch.setattr(
                backends.BACKENDS[name], "unavailable", classmethod(lambda cls, device, reason=reason: reason)
            )
            monkeypatch.setattr(backends.BACKENDS[name], "_make_plan", lambda self: None)

    backends._note_fallback.cache_clear()
    yield say
    backends._note_fallback.cache_clear()


def test_auto_says_once_why_a_gpu_is_not_served_by_the_first_backend(serve: Callable[..., None]) -> None:
    rule, device = fusedopt.FusedAdamW.rule, torch.device("cuda", 0)
    serve(native="built without CUDA", triton=None)
    with pytest.warns(UserWarning, match="fusedopt: native: built without CUDA; using the triton backend"):
        assert backends.create_backend("auto", rule, [device]).name == "triton"
    assert backends.create_backend("auto", rule, [device]).name == "triton"  # silent now: warnings are errors here
    serve(triton="not installed")
    with pytest.warns(
        UserWarning, match="native: built without CUDA; triton: not installed; using the slow reference backend"
    ):
        assert backends.create_backend("auto", rule, [device]).name == "reference"
    serve(native=None)
    assert backends.create_backend("auto", rule, [device]).name == "native"


def test_parameters_on_a_cpu_and_a_gpu_are_for_the_reference_backend(serve: Callable[..., None]) -> None:
    rule, devices = fusedopt.FusedAdamW.rule, [torch.device("cpu"), torch.device("cuda", 0)]
    serve(native=None, triton=None)
    for name in ("native", "triton"):
        with pytest.raises(BackendUnavailable, match="one optimizer has parameters on cpu and cuda"):
            backends.create_backend(name, rule, devices)
    with pytest.warns(
        UserWarning, match="native and triton: one .* parameters on cpu and cuda; using the slow reference backend"
    ):
        assert backends.create_backend("auto", rule, devices).name == "reference"


def test_the_environment_names_the_backend_that_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "reference")
    assert fusedopt.FusedSGD(parameters([(3,)])).backend_in_use == "reference"
    assert fusedopt.FusedSGD(parameters([(3,)]), backend="native").backend_in_use == "native"
    monkeypatch.setenv("FUSEDOPT_BACKEND", "")
    assert fusedopt.FusedSGD(parameters([(3,)])).backend_in_use == "native"
    monkeypatch.setenv("FUSEDOPT_BACKEND", "trton")
    unknown = "FUSEDOPT_BACKEND in the environment: unknown backend 'trton'; did you mean 'triton'?"
    with pytest.raises(ValueError, match=re.escape(unknown)):
        fusedopt.FusedSGD(parameters([(3,)]))
    monkeypatch.setenv("FUSEDOPT_BACKEND", "triton")
    monkeypatch.setattr(TritonBackend, "unavailable", classmethod(lambda cls, device: "no driver"))
    with pytest.raises(BackendUnavailable, match=r"'triton' \(from FUSEDOPT_BACKEND .*\) is not available: no driver"):
        fusedopt.FusedSGD(parameters([(3,)]))


@pytest.mark.skipif(GPU, reason="there is a GPU that can be used")
def test_a_gpu_that_cannot_be_used_has_a_reason() -> None:
    assert NativeBackend.unavailable(torch.device("xpu", 0)) == "this build has no kernels for xpu tensors"
    reason = NativeBackend.unavailable(torch.device("cuda", 0))
    assert reason, "no GPU here, and nothing said about it"
    with pytest.raises(BackendUnavailable, match=re.escape(reason)):
        create_backend("native", fusedopt.FusedAdamW.rule, [torch.device("cuda", 0)])


def test_unknown_instruction_set() -> None:
    from cases import module

    if module is None:
        pytest.skip("the compiled module is not built")
    with pytest.raises(ValueError, match="'sse9' is not available; expected one of baseline"):
        module.use_cpu_isa("sse9")
