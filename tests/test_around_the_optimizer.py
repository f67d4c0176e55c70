"""What others put around an optimizer or hand to it is served rightly, or refused by name before anything changed."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BACKENDS, backend_name, each_optimizer
from torch import nn

import fusedopt
from fusedopt import AmpOptimWrapper, OptimWrapper
from fusedopt.optimizers import FusedOptimizer

CLIP = {"type": "norm", "max_norm": 1.0, "norm_type": 2.0, "error_if_nonfinite": False}
LOOSE = {**CLIP, "max_norm": 100.0}


class AsLightning:
    """As Lightning's: of a class made of both, with attributes of its own, passing on what it does not find."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (AsLightning, type(optimizer)), {})

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return self._optimizer.step(closure, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class AsOlderOnes:
    """Of a class made of both, with a copy of the optimizer's attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (AsOlderOnes, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None, **kwargs: Any) -> Any:
        return self._optimizer.step(closure, **kwargs)


class WithTheSameAttributes(AsOlderOnes):
    """Of a class made of both, with the very ``__dict__`` of the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.__dict__ = vars(optimizer)
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (AsOlderOnes, type(optimizer)), {})
        inner = copy.copy(optimizer)
        inner.__dict__ = self.__dict__
        self.__dict__["_optimizer"] = inner


class TestAccelerate:
    """Its wrapper shares nothing with the optimizer, and has no ``__getattr__``."""

    @pytest.fixture
    def outer(self, monkeypatch: pytest.MonkeyPatch) -> type:
        class AcceleratedOptimizer(torch.optim.Optimizer):
            def __init__(self, optimizer):
                self.optimizer = optimizer
                self.optimizer.load_state_dict(self.optimizer.state_dict())

            param_groups = property(lambda self: self.optimizer.param_groups)
            state = property(lambda self: self.optimizer.state)

            def step(self, closure=None):
                self.optimizer.step(closure)

        module = SimpleNamespace(AcceleratedOptimizer=AcceleratedOptimizer)
        monkeypatch.setitem(sys.modules, "accelerate.optimizer", module)
        return AcceleratedOptimizer

    def param(self) -> nn.Parameter:
        param = nn.Parameter(torch.zeros(4))
        param.grad = torch.full((4,), 5.0)  # of norm 10
        return param

    @pytest.mark.parametrize("first", [True, False], ids=["imported first", "imported later"])
    def test_what_is_assigned_reaches_the_optimizer(self, outer, monkeypatch, first):
        param = self.param()
        if not first:
            module = sys.modules.pop("accelerate.optimizer")
        optimizer = fusedopt.FusedSGD([param], lr=1.0)
        if not first:
            monkeypatch.setitem(sys.modules, "accelerate.optimizer", module)
        wrapped = outer(optimizer)
        wrapped.clip_grad = dict(max_norm=1.0)
        assert optimizer.clip_grad == wrapped.clip_grad == CLIP
        wrapped.write_back_grads = True
        wrapped.step()
        torch.testing.assert_close(param.detach(), torch.full((4,), -0.5))
        torch.testing.assert_close(param.grad, torch.full((4,), 0.5))
        assert float(wrapped.last_step.grad_norm) == 10.0
        with pytest.raises(ValueError, match="did you mean 'max_norm'"):
            wrapped.clip_grad = dict(max_nrom=1.0)

    def test_around_another_optimizer_attributes_are_its_own(self, outer):
        fusedopt.FusedSGD([self.param()], lr=1.0)
        wrapped = outer(torch.optim.SGD([self.param()], lr=1.0))
        with pytest.raises(AttributeError, match="'AcceleratedOptimizer' object has no attribute 'clip_grad'"):
            wrapped.clip_grad  # noqa: B018
        wrapped.clip_grad = "theirs"
        assert wrapped.clip_grad == "theirs" and not hasattr(wrapped.optimizer, "clip_grad")


@pytest.mark.parametrize("around", [AsLightning, AsOlderOnes, WithTheSameAttributes])
@pytest.mark.parametrize("backend", BACKENDS)
class TestObjectsAroundAnOptimizer:
    def pair(self, around: Any, backend: str) -> tuple[Any, Any, nn.Parameter]:
        param = nn.Parameter(torch.zeros(4))
        param.grad = torch.full((4,), 5.0)  # of norm 10
        optimizer = fusedopt.FusedSGD([param], lr=1.0, backend=backend_name(backend))
        return around(optimizer), optimizer, param

    def test_clipping_that_is_set_there_is_done(self, around, backend):
        outer, optimizer, param = self.pair(around, backend)
        outer.clip_grad = dict(max_norm=1.0)
        assert optimizer.clip_grad == outer.clip_grad == CLIP
        outer.step()
        torch.testing.assert_close(param.detach(), torch.full((4,), -0.5))
        assert float(outer.last_step.grad_norm) == float(optimizer.last_step.grad_norm) == 10.0
        outer.clip_grad = None
        outer.step()
        torch.testing.assert_close(param.detach(), torch.full((4,), -5.5))

    def test_a_mistake_there_is_an_error(self, around, backend):
        outer, optimizer, _ = self.pair(around, backend)
        optimizer.clip_grad = CLIP
        with pytest.raises(ValueError, match="unknown key 'max_nrom' for type 'norm'; did you mean 'max_norm'"):
            outer.clip_grad = dict(max_nrom=1.0)
        assert optimizer.clip_grad == CLIP

    def test_gradients_are_written_back(self, around, backend):
        outer, _, param = self.pair(around, backend)
        outer.clip_grad = dict(max_norm=1.0)
        outer.write_back_grads = True
        outer.step()
        torch.testing.assert_close(param.grad, torch.full((4,), 0.5))

    def test_our_scaler_scales_through_it(self, around, backend):
        outer, _, param = self.pair(around, backend)
        scaler = fusedopt.amp.GradScaler(param.device.type, init_scale=4.0, growth_interval=1)
        scaler.scale((param * 3.0).sum()).backward()
        param.grad.fill_(12.0)
        scaler.step(outer)
        assert param.tolist() == [-3.0] * 4
        param.grad.fill_(float("inf"))
        scaler.update()
        scaler.step(outer)
        assert param.tolist() == [-3.0] * 4
        assert float(outer.last_step.found_inf) == 1.0

    def test_a_stock_scaler_scales_through_it(self, around, backend):
        outer, optimizer, param = self.pair(around, backend)
        scaler = torch.amp.GradScaler(param.device.type, init_scale=4.0)
        scaler.scale((param * 3.0).sum()).backward()
        for gradient, expected in ((12.0, -3.0), (float("inf"), -3.0)):
            param.grad.fill_(gradient)
            scaler.step(outer)
            scaler.update()
            assert param.tolist() == [expected] * 4
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(outer, "found_inf")

    def test_a_stock_scaler_is_told_through_it(self, around, backend):
        outer, optimizer, _ = self.pair(around, backend)
        outer._step_supports_amp_scaling = False
        assert optimizer._step_supports_amp_scaling is outer._step_supports_amp_scaling is False

    def test_a_wrapper_of_ours_clips_through_it(self, around, backend):
        outer, _, param = self.pair(around, backend)
        wrapper = OptimWrapper(outer, clip_grad=dict(max_norm=1.0))
        wrapper.step()
        torch.testing.assert_close(param.detach(), torch.full((4,), -0.5))
        assert float(wrapper.grad_norm) == 10.0


@pytest.mark.parametrize("wrapper", [OptimWrapper, AmpOptimWrapper])
def test_our_own_wrappers_refuse_what_they_would_lose(wrapper):
    with pytest.raises(AttributeError, match="clip_grad"):
        wrapper(optimizer=fusedopt.FusedSGD([nn.Parameter(torch.ones(1))])).clip_grad = CLIP


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_settings_of_its_own(again):
    optimizer = fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], clip_grad=CLIP, write_back_grads=True)
    optimizer._step_supports_amp_scaling = False
    other = again(optimizer)
    assert (other.clip_grad, other.write_back_grads, other._step_supports_amp_scaling) == (CLIP, True, False)
    other.clip_grad = None
    other._step_supports_amp_scaling = True
    assert (optimizer.clip_grad, optimizer._step_supports_amp_scaling) == (CLIP, False)


class Watched(fusedopt.FusedSGD):
    """Counts the calls of its step, as one who wants to know of skipped ones does."""

    calls = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("clip", [None, CLIP, LOOSE], ids=["bare", "clip", "loose"])
class TestWhoSkips:
    """``_step_supports_amp_scaling`` of an instance: whether a stock scaler leaves the skipping to the step."""

    def trained(self, scaler: torch.amp.GradScaler, supports: bool | None, clip: Any) -> tuple[Any, list[Any]]:
        param = nn.Parameter(torch.zeros(4))
        optimizer = Watched([param], lr=0.5, momentum=0.5, clip_grad=clip)
        if supports is not None:
            optimizer._step_supports_amp_scaling = supports
        history = []
        for gradient in (3.0, float("inf"), 2.0, float("nan"), 1.0):
            optimizer.zero_grad()
            scaler.scale((param * torch.full((4,), gradient)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append((param.detach().clone(), scaler.get_scale(), optimizer.calls))
        return optimizer, history

    def test_off_a_stock_scaler_makes_no_step_that_is_skipped(self, clip):
        stock = lambda: torch.amp.GradScaler("cpu", init_scale=8.0)  # noqa: E731
        _, on = self.trained(stock(), None, clip)
        _, off = self.trained(stock(), False, clip)
        assert [calls for _, _, calls in on] == [1, 2, 3, 4, 5]
        assert [calls for _, _, calls in off] == [1, 1, 2, 2, 3]
        for (value, scale, _), (other, other_scale, _) in zip(on, off, strict=True):
            torch.testing.assert_close(value, other)
            assert scale == other_scale
        assert [scale for _, scale, _ in off] == [8.0, 4.0, 4.0, 2.0, 2.0]

    def test_our_scaler_does_the_same_in_either_case(self, clip):
        results = [
            self.trained(fusedopt.amp.GradScaler("cpu", init_scale=8.0), supports, clip)
            for supports in (None, False, True)
        ]
        for optimizer, history in results:
            assert [calls for _, _, calls in history] == [1, 2, 3, 4, 5]
            for (value, scale, _), (other, other_scale, _) in zip(history, results[0][1], strict=True):
                assert torch.equal(value, other)
                assert scale == other_scale
            assert float(optimizer.last_step.found_inf) == 0.0

    def test_our_scaler_after_unscaling_by_hand(self, clip):
        for supports in (None, False):
            param = nn.Parameter(torch.zeros(4))
            optimizer = Watched([param], lr=0.5, clip_grad=clip)
            if supports is not None:
                optimizer._step_supports_amp_scaling = supports
            scaler = fusedopt.amp.GradScaler("cpu", init_scale=8.0)
            for gradient in (3.0, float("inf")):
                optimizer.zero_grad()
                scaler.scale((param * gradient).sum()).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            assert optimizer.calls == 2
            assert optimizer._step_supports_amp_scaling is (supports is None)

    def test_it_costs_no_pass(self, clip, monkeypatch):
        """A stock scaler's own pass over the gradients is made either way, and none besides."""
        counts = []
        name = "_amp_foreach_non_finite_check_and_unscale_"
        real = getattr(torch, name)
        for supports in (True, False):
            calls: list[int] = []
            monkeypatch.setattr(torch, name, lambda *args, calls=calls: (calls.append(1), real(*args))[1])
            self.trained(torch.amp.GradScaler("cpu", init_scale=8.0), supports, clip)
            counts.append(len(calls))
        assert counts == [5, 5]


def test_who_skips_is_true_or_false():
    optimizer = fusedopt.FusedSGD([nn.Parameter(torch.ones(1))])
    assert optimizer._step_supports_amp_scaling is True
    with pytest.raises(TypeError, match="_step_supports_amp_scaling must be True or False, got 1"):
        optimizer._step_supports_amp_scaling = 1
    assert optimizer._step_supports_amp_scaling is True


def shard() -> nn.Parameter:
    param = nn.Parameter(torch.ones(4))
    param._fsdp_flattened = True
    return param


IS_SHARD = r"parameter \(param_groups\[\d\]\['params'\]\[0\], shape \(4,\)\) "
USE_FSDPS = IS_SHARD + r"is a shard of a FullyShardedDataParallel.*call the model's own clip_grad_norm_\(max_norm\)"
USE_SHARDED_SCALER = IS_SHARD + r".*expected torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
NO_MODEL = IS_SHARD + r"belongs to FullyShardedDataParallel, but no model has it"


class TestShardsOfNoModel:
    """What FullyShardedDataParallel has flattened, without the model that knows over which processes."""

    @pytest.mark.parametrize("clip", [CLIP, {**CLIP, "norm_type": float("inf")}, {**CLIP, "max_norm": float("inf")}])
    def test_a_norm_over_them_is_refused(self, clip):
        for groups in ([shard()], [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [shard()]}]):
            with pytest.raises(ValueError, match=NO_MODEL):
                fusedopt.FusedAdamW(groups, clip_grad=clip)
            optimizer = fusedopt.FusedAdamW(groups)
            with pytest.raises(ValueError, match=NO_MODEL):
                optimizer.clip_grad = clip
            assert optimizer.clip_grad is None
            with pytest.raises(ValueError, match=NO_MODEL):
                OptimWrapper(optimizer, clip_grad=clip)
            with pytest.raises(ValueError, match=USE_FSDPS):
                OptimWrapper(torch.optim.AdamW(groups), clip_grad=clip)
        optimizer = fusedopt.FusedAdamW([nn.Parameter(torch.ones(2))], clip_grad=clip)
        with pytest.raises(ValueError, match=NO_MODEL):
            optimizer.add_param_group({"params": [shard()]})
        assert len(optimizer.param_groups) == 1
        with pytest.raises(ValueError, match=NO_MODEL):
            fusedopt.fuse(torch.optim.SGD([shard()], lr=0.1), clip_grad=clip)

    @pytest.mark.parametrize("clip", [None, CLIP])
    def test_a_step_of_a_model_that_was_sharded_since_is_refused(self, clip):
        param = nn.Parameter(torch.ones(4))
        optimizer = fusedopt.FusedSGD([param], clip_grad=clip)
        stock = OptimWrapper(torch.optim.SGD([param]), clip_grad=CLIP)
        param.grad = torch.ones(4)
        param._fsdp_flattened = True
        with pytest.raises(ValueError, match=NO_MODEL):
            optimizer.step()
        with pytest.raises(ValueError, match=USE_FSDPS):
            stock.step()
        scaler = fusedopt.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(ValueError, match=NO_MODEL):
            scaler.step(optimizer)
        assert param.tolist() == [1.0] * 4

    @pytest.mark.parametrize("method", ["step", "unscale_"])
    def test_our_scaler_refuses_those_of_stock_optimizers(self, method):
        param = shard()
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler = fusedopt.amp.GradScaler("cpu")
        scaler.scale(param.sum()).backward()
        with pytest.raises(ValueError, match=USE_SHARDED_SCALER):
            getattr(scaler, method)(optimizer)
        assert param.tolist() == [1.0] * 4
        assert param.grad.tolist() == [65536.0] * 4
        disabled = fusedopt.amp.GradScaler("cpu", enabled=False)
        getattr(disabled, method)(optimizer)

    def test_a_scaler_that_would_skip_by_itself_is_refused(self):
        param = shard()
        optimizer = fusedopt.FusedSGD([param], lr=1.0)
        optimizer._step_supports_amp_scaling = False
        assert optimizer._step_supports_amp_scaling is False
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(param.sum()).backward()
        with pytest.raises(ValueError, match=USE_SHARDED_SCALER):
            scaler.step(optimizer)
        assert param.tolist() == [1.0] * 4
        assert param.grad.tolist() == [4.0] * 4


class TestTorchsZeroRedundancyOptimizer:
    @pytest.fixture(autouse=True)
    def _process_group(self, tmp_path):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def test_clipping_in_it_is_refused(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".torch.jit.* is deprecated", DeprecationWarning)
            from torch.distributed.optim import ZeroRedundancyOptimizer
        params = [nn.Parameter(torch.ones(3))]
        message = r"expected fusedopt\.ZeroRedundancyOptimizer\(params, optimizer_type=\.\.\., clip_grad=\.\.\.\)"
        with pytest.raises(ValueError, match=message):
            ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.FusedAdamW, clip_grad=CLIP)
        ZeroRedundancyOptimizer(params, optimizer_class=fusedopt.FusedAdamW, lr=1.0)
        ours = fusedopt.ZeroRedundancyOptimizer(params, "FusedAdamW", clip_grad=CLIP)
        params[0].grad = torch.full((3,), 2.0)
        ours.step()
        torch.testing.assert_close(float(ours.last_step.grad_norm), 2 * 3**0.5)
        with pytest.raises(TypeError, match=r"params is a model, Linear; expected its parameters"):
            fusedopt.ZeroRedundancyOptimizer(nn.Linear(2, 2), "FusedAdamW")

    def test_clipping_in_a_group_is_refused(self):
        with pytest.raises(ValueError, match="clip_grad is no setting of a parameter group"):
            fusedopt.FusedSGD([{"params": [nn.Parameter(torch.ones(3))], "clip_grad": CLIP}])


@each_optimizer
class TestModels:
    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.ReLU()), nn.ModuleList([nn.ReLU()])])
    def test_a_model_for_its_parameters(self, cls, model):
        kind = type(model).__name__
        for params, place in (
            (model, "params"),
            ([model], "an entry of params"),
            ([{"params": model}], "params of a parameter group"),
            ([{"params": [model]}], "an entry of params"),
            (list(model.named_children()) or [("name", model)], "an entry of params"),
        ):
            with pytest.raises(TypeError, match=rf"^{place} is a model, \w+; expected its parameters"):
                cls(params)
        with pytest.raises(TypeError, match=f"params is a model, {kind}; "):
            cls(model)


class Quantised(torch.Tensor):
    """As other packages' state: a subclass without memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            return Quantised(args[0].inner)
        raise NotImplementedError(func)


@pytest.mark.parametrize("backend", BACKENDS)
class TestQuantisedState:
    MESSAGE = (
        r"state 'exp_avg' of parameter 'weight' \(param_groups\[0\]\['params'\]\[0\], shape \(3,\)\) is of type "
        r"test_around_the_optimizer\.Quantised, a tensor subclass"
    )

    def stepped(self, backend: str) -> tuple[Any, nn.Parameter]:
        param = nn.Parameter(torch.ones(3))
        optimizer = fusedopt.FusedAdamW([("weight", param)], lr=0.1, backend=backend_name(backend))
        param.grad = torch.ones(3)
        optimizer.step()
        return optimizer, param

    def test_loaded(self, backend):
        optimizer, param = self.stepped(backend)
        state = optimizer.state_dict()
        state["state"][0] = {**state["state"][0], "exp_avg": Quantised(torch.zeros(3))}
        before = {key: value.clone() for key, value in optimizer.state[param].items()}
        with pytest.raises(TypeError, match=self.MESSAGE):
            optimizer.load_state_dict(state)
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, before[key])

    def test_put_into_the_state(self, backend):
        optimizer, param = self.stepped(backend)
        value = param.detach().clone()
        optimizer.state[param]["exp_avg"] = Quantised(torch.zeros(3))
        with pytest.raises(TypeError, match=self.MESSAGE):
            optimizer.step()
        assert torch.equal(param.detach(), value)
        assert float(optimizer.state[param]["step"]) == 1.0


def run(code: str, timeout: float = 300) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_can_be_reloaded():
    code = """
import importlib, sys, fusedopt.training.engine, fusedopt.optimizers, fusedopt.training.schedulers, torch
importlib.reload(fusedopt.optimizers)
importlib.reload(fusedopt)
for _ in range(2):
    for name in sorted(sys.modules):
        if name.split('.')[0] == 'fusedopt' and not name.startswith('fusedopt._C'):
            importlib.reload(sys.modules[name])
assert fusedopt.OPTIMIZERS.get('FusedAdamW') is fusedopt.optimizers.FusedAdamW
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
fusedopt.optimizers.FusedSGD([param], lr=0.5).step()
print(param.tolist())
"""
    assert run(code).strip() == "[0.5, 0.5, 0.5]"


def test_reloading_here_leaves_the_classes_what_they_are():
    before = fusedopt.FusedAdamW
    importlib.reload(fusedopt.optimizers)
    assert fusedopt.OPTIMIZERS.get("FusedAdamW") is fusedopt.optimizers.FusedAdamW is before


def test_a_name_that_is_taken_by_something_else_is_still_an_error():
    class FusedAdamW(FusedOptimizer):
        pass

    with pytest.raises(KeyError, match=re.escape("'FusedAdamW' is already in the optimizer registry")):
        fusedopt.OPTIMIZERS.register_module(module=FusedAdamW)


#: The README's loop, ``{loss}`` being how it makes gradients and steps.
LOOP = """
import time, torch, torch.nn as nn, fusedopt
import torch._dynamo as dynamo
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
data = [torch.randn(8, 16) for _ in range(10)]
optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-3, clip_grad=dict(max_norm=1.0))
scaler = fusedopt.amp.GradScaler("cpu")

def plain(x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def amp(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

def loop(xs):
    for x in xs:
        body(x)
"""


@pytest.mark.slow
@pytest.mark.parametrize("body", [pytest.param("plain", marks=pytest.mark.full), "amp"])
class TestCompiledCallers:
    def test_graphs_are_broken_at_three_places_at_most(self, body):
        code = f"""{LOOP}
body = {body}
found = dynamo.explain(body)(data[0])
print(found.graph_break_count)
dynamo.reset()
counters.clear()
step = torch.compile(loop, backend="eager")
step(data)
ours = [text for text in counters["graph_break"] if any(f"`{{name}}`" in text for name in
        ("_step", "_chosen_backend", "update_scale", "_update_from")) or "fusedopt._C" in text]
print(len(ours), sum("step" in text or "update" in text for text in counters["graph_break"]))
"""
        breaks, within = run(code).splitlines()
        assert int(breaks) <= 3
        inside, calls = map(int, within.split())
        assert inside == 0
        assert calls <= (1 if body == "plain" else 2) + 1  # the calls themselves; torch names their caller, too

    def test_the_weights_are_those_of_the_loop_as_it_is(self, body):
        code = f"""{LOOP}
import copy
body = {body}
start = copy.deepcopy(model.state_dict())
loop(data)
expected = copy.deepcopy(model.state_dict())
model.load_state_dict(start)
optimizer = fusedopt.FusedAdamW(model.parameters(), lr=1e-3, clip_grad=dict(max_norm=1.0))
scaler = fusedopt.amp.GradScaler("cpu")
compiled = torch.compile(loop, backend="eager")
compiled(data)
for name, value in model.state_dict().items():
    torch.testing.assert_close(value, expected[name])
print(float(optimizer.last_step.grad_norm) > 0, int(optimizer.state[model[0].weight]["step"]))
"""
        assert run(code).split() == ["True", "10"]

    def test_hooks_and_closures_are_called(self, body):
        code = f"""{LOOP}
body = {body}
calls = []
optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
optimizer.register_step_post_hook(lambda *_: calls.append("post"))
compiled = torch.compile(loop, backend="eager")
compiled(data[:2])
print(*calls)
"""
        assert run(code).split() == ["pre", "post"] * 2


def test_importing_brings_no_compiler():
    assert run("import sys, fusedopt; print('torch._dynamo' in sys.modules)").strip() == "False"


def test_the_step_is_marked_as_hooked():
    assert FusedOptimizer.step.hooked is True
    assert Watched.step is not FusedOptimizer.step  # torch wraps that of a subclass, which then counts as hooked too


class TestRepr:
    def test_what_holds_for_all_groups(self):
        optimizer = fusedopt.FusedAdamW(
            [nn.Parameter(torch.ones(1))], clip_grad=CLIP, write_back_grads=True, backend="reference"
        )
        lines = repr(optimizer).splitlines()
        assert lines[0] == "FusedAdamW ("
        assert "    lr: 0.001" in lines
        assert lines[-5:] == [
            "Over all groups",
            f"    clip_grad: {CLIP}",
            "    write_back_grads: True",
            "    backend: reference",
            ")",
        ]

    def test_the_backend_is_the_one_in_use(self):
        optimizer = fusedopt.FusedSGD([nn.Parameter(torch.ones(1))])
        assert f"    backend: {optimizer.backend_in_use}\n" in repr(optimizer)
        assert "    clip_grad: None\n    write_back_grads: False\n" in repr(optimizer)
        assert "clip_grad: None" in repr(AsLightning(optimizer))


def test_a_process_without_others_does_not_look_through_all_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a tenth of a second before the first step of an optimizer with parameters that have no gradient."""
    import torch.distributed.tensor  # whatever imports it: nothing is sharded without a process group

    def looked() -> None:
        raise AssertionError("gc.get_objects() was called")

    assert not dist.is_initialized()
    monkeypatch.setattr("gc.get_objects", looked)
    fusedopt.FusedAdamW([torch.nn.Parameter(torch.ones(2))]).step()
