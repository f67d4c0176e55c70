"""Averaged models: MMEngine's and torch's numbers, in a fixed number of calls; buffers, state dicts, bad input."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import re
import warnings
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt.training.averaging as ours
from fusedopt import FusedAdamW
from fusedopt.training.averaging import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from fusedopt.training.registry import MODELS

CLASSES = [StochasticWeightAverage, ExponentialMovingAverage, MomentumAnnealingEMA]


class Net(nn.Module):
    """Convolution, batch norm, a tied and a frozen parameter, a buffer of each kind."""

    def __init__(self, width: int = 4, tied: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, width)
        if tied:
            self.head.weight = self.fc.weight
        self.scale = nn.Parameter(torch.randn(()), requires_grad=False)
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)
        self.register_buffer("empty", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.fc(x) + self.shift) * self.scale


@torch.no_grad()
def change(model: nn.Module) -> None:
    """Stands in for a training step: other values for parameters and buffers."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.mul_(0.9).add_(torch.randn_like(tensor))
        else:
            tensor.add_(3)


def assert_equal(left: dict[str, Any], right: dict[str, Any], tolerance: float = 0.0) -> None:
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=tolerance, rtol=tolerance, msg=f"{name} differs")


def trained(cls: type[BaseAveragedModel], updates: int = 3, **settings: Any) -> tuple[BaseAveragedModel, Net]:
    model = Net()
    average = cls(model, **settings)
    for _ in range(updates):
        change(model)
        average.update_parameters(model)
    return average, model


@pytest.fixture(scope="module")
def theirs() -> Any:
    """mmengine.model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
        from mmengine import model
    return model


class TestAgainstMMEngine:
    @settings(max_examples=60, deadline=None)
    @given(
        cls=st.sampled_from(CLASSES),
        seed=st.integers(0, 2**16),
        interval=st.integers(1, 4),
        update_buffers=st.booleans(),
        momentum=st.floats(1e-4, 0.5),
        gamma=st.integers(1, 20),
        calls=st.integers(0, 12),
    )
    def test_the_same_numbers(self, theirs, cls, seed, interval, update_buffers, momentum, gamma, calls):
        torch.manual_seed(seed)
        # With update_buffers MMEngine averages a tied parameter once for each of its names.
        model = Net(width=1 + seed % 5, tied=not update_buffers)
        arguments: dict[str, Any] = dict(interval=interval, update_buffers=update_buffers)
        if cls is not StochasticWeightAverage:
            arguments["momentum"] = momentum
        if cls is MomentumAnnealingEMA:
            arguments["gamma"] = gamma
        mine, other = cls(model, **arguments), getattr(theirs, cls.__name__)(model, **arguments)
        for _ in range(calls):
            change(model)
            mine.update_parameters(model)
            other.update_parameters(model)
        expected = other.state_dict()
        counts = "module.norm.num_batches_tracked"
        if update_buffers and calls:  # MMEngine leaves counts as they were at the first call
            assert mine.state_dict()[counts] == model.norm.num_batches_tracked
            expected[counts] = mine.state_dict()[counts]
        # MMEngine's SWA writes the same mean in another way.
        assert_equal(mine.state_dict(), expected, 1e-5 if cls is StochasticWeightAverage else 0.0)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_state_dicts_load_both_ways(self, theirs, cls):
        average, model = trained(cls, 5, interval=2)
        other = getattr(theirs, cls.__name__)(Net(), interval=2)
        other.load_state_dict(average.state_dict())
        back = cls(Net(), interval=2)
        back.load_state_dict(other.state_dict())
        for _ in range(3):
            change(model)
            for each in (average, other, back):
                each.update_parameters(model)
        assert_equal(back.state_dict(), average.state_dict())
        assert_equal(other.state_dict(), average.state_dict(), 1e-5 if cls is StochasticWeightAverage else 0.0)

    def test_a_subclass_with_avg_func_is_called_for_each_tensor(self, theirs):
        def make(base: Any) -> Any:
            class ExpMomentumEMA(base):
                """As in MMDetection."""

                def avg_func(self, averaged_param, source_param, steps):
                    momentum = (1 - self.momentum) * math.exp(-float(1 + steps) / 10) + self.momentum
                    averaged_param.mul_(1 - momentum).add_(source_param, alpha=momentum)

            return ExpMomentumEMA

        model = Net()
        mine, other = make(ExponentialMovingAverage)(model, 0.1), make(theirs.ExponentialMovingAverage)(model, 0.1)
        for _ in range(4):
            change(model)
            mine.update_parameters(model)
            other.update_parameters(model)
        assert_equal(mine.state_dict(), other.state_dict(), 1e-6)
        assert not torch.equal(mine.module.conv.weight, model.conv.weight)

    def test_its_registry_builds_ours_by_import_path(self, theirs):
        from mmengine.registry import MODELS as THEIRS

        average = THEIRS.build(
            dict(type="fusedopt.training.averaging.ExponentialMovingAverage", model=Net(), momentum=0.1)
        )
        assert type(average) is ExponentialMovingAverage and average.momentum == 0.1


class TestAgainstTorch:
    def test_the_same_numbers(self):
        model = Net(tied=False)
        pairs = [
            (ExponentialMovingAverage(model, 0.25), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75)), 0.0),
            (StochasticWeightAverage(model), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()), 1e-6),
        ]
        for _ in range(6):
            change(model)
            for mine, theirs, _ in pairs:
                mine.update_parameters(model)
                theirs.update_parameters(model)
        for mine, theirs, tolerance in pairs:
            assert_equal(mine.torch_state_dict(), theirs.state_dict(), tolerance)

    @pytest.mark.parametrize("interval", [1, 3])
    @pytest.mark.parametrize("calls", [0, 1, 2, 3, 4, 7])
    def test_state_dicts_load_both_ways(self, interval, calls):
        average, model = trained(StochasticWeightAverage, calls, interval=interval)
        theirs = AveragedModel(Net())
        theirs.load_state_dict(average.torch_state_dict())
        assert theirs.n_averaged == math.ceil(calls / interval)
        state = theirs.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        back = StochasticWeightAverage(Net(), interval=interval)
        back.load_state_dict(state)
        assert_equal(state, before)
        assert_equal(back.torch_state_dict(), before)
        for _ in range(interval):
            change(model)
            back.update_parameters(model)
        theirs.update_parameters(model)
        assert back.torch_state_dict()["n_averaged"] == theirs.n_averaged
        if interval == 1:
            assert_equal(back.torch_state_dict(), theirs.state_dict(), 1e-6)

    def test_what_is_simply_torchs_is_torchs(self):
        for name in ("AveragedModel", "SWALR", "update_bn", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn"):
            assert getattr(ours, name) is getattr(torch.optim.swa_utils, name)

    def test_update_bn_takes_an_averaged_model(self):
        average, _ = trained(StochasticWeightAverage)
        inputs = [torch.randn(8, 2, 5, 5) for _ in range(3)]
        ours.update_bn(inputs, average)
        hidden = torch.cat([average.module.conv(each) for each in inputs])
        torch.testing.assert_close(average.module.norm.running_mean, hidden.mean((0, 2, 3)))


class Calls(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(count)))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("count", [1, 50])
def test_an_update_is_a_fixed_number_of_calls_and_waits_for_nothing(cls, count):
    model = layers(count)
    average = cls(model)
    average.update_parameters(model)
    with Calls() as calls:
        average.update_parameters(model)
    # Buffers are of two dtypes; the last call counts.
    assert calls.names == {"_foreach_lerp_": 1, "_foreach_copy_": 2, "add_": 1}


@pytest.mark.parametrize("count", [1, 50])
def test_an_update_in_another_dtype_is_a_fixed_number_of_calls(count):
    model = layers(count).bfloat16()
    average = ExponentialMovingAverage(model, dtype="float32")
    average.update_parameters(model)
    with Calls() as calls:
        average.update_parameters(model)
    assert calls.names == {"_foreach_sub": 1, "_foreach_add_": 1, "_foreach_copy_": 2, "add_": 1}


def test_from_another_device_the_source_is_copied_to_memory_that_is_kept():
    model = layers(50)
    average = ExponentialMovingAverage(model, device="meta", dtype="float64")
    average.steps = torch.tensor(0)
    average.update_parameters(model)
    for first in (True, False):
        with Calls() as calls:
            average.update_parameters(model)
        assert calls.names.pop("empty_like", 0) == (200 if first else 0)
        assert calls.names == {"_foreach_copy_": 3, "_foreach_lerp_": 1, "add_": 1}


def test_a_call_between_two_updates_copies_buffers_only():
    average, model = trained(ExponentialMovingAverage, 1, interval=2)
    before = average.module.conv.weight.clone()
    change(model)
    average.update_parameters(model)
    assert torch.equal(average.module.conv.weight, before)
    assert torch.equal(average.module.norm.running_mean, model.norm.running_mean)
    assert average.steps == 2


class TestBuffers:
    def test_copied_by_default(self):
        average, model = trained(ExponentialMovingAverage)
        for (name, mine), theirs in zip(average.module.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(mine, theirs), name

    def test_update_buffers_averages_what_has_a_mean_and_is_saved(self):
        average, model = trained(ExponentialMovingAverage, update_buffers=True)
        for name in ("norm.running_mean", "norm.running_var", "shift"):
            assert not torch.equal(average.module.get_buffer(name), model.get_buffer(name)), name
        for name in ("norm.num_batches_tracked", "mask"):
            assert torch.equal(average.module.get_buffer(name), model.get_buffer(name)), name

    def test_a_buffer_that_forward_makes_anew_is_followed(self):
        average, model = trained(ExponentialMovingAverage)
        model.shift = torch.full((4,), 7.0)
        average.update_parameters(model)
        assert torch.equal(average.module.shift, model.shift)

    def test_one_that_is_not_saved_may_come_and_go(self):
        average, model = trained(ExponentialMovingAverage)
        model.register_buffer("cache", torch.ones(3), persistent=False)
        model.mask = torch.ones(5)
        average.update_parameters(model)
        assert not hasattr(average.module, "cache")
        assert average.module.mask.shape == (2,)


class TestPrecision:
    def test_a_low_precision_average_is_warned_of(self):
        for dtype, share in (("bfloat16", "0.002"), ("float16", "0.0002")):
            message = (
                f"average of {dtype} parameters is kept in {dtype} too.*less than {share} of it; pass dtype='float32'"
            )
            with pytest.warns(UserWarning, match=message) as caught:
                ExponentialMovingAverage(Net().to(getattr(torch, dtype)))
            assert [each.filename for each in caught] == [__file__]
            ExponentialMovingAverage(Net().to(getattr(torch, dtype)), dtype=dtype)  # as asked for: no warning

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cls", CLASSES)
    def test_a_float32_average_of_a_low_precision_model(self, cls, dtype):
        """It follows where one in the model's dtype stands still: as the formula in float64 does."""
        model = Net().to(dtype)
        average = cls(model, dtype=torch.float32)
        expected = None
        for steps in range(50):
            change(model)
            average.update_parameters(model)
            value = model.conv.weight.detach().double()
            expected = value if expected is None else torch.lerp(expected, value, average.update_weight(steps))
        assert {each.dtype for each in average.module.parameters()} == {torch.float32}
        torch.testing.assert_close(average.module.conv.weight.double(), expected, atol=1e-6, rtol=1e-6)

    def test_a_low_precision_average_of_a_float32_model_is_rounded_once_each_update(self):
        model = Net()
        average = ExponentialMovingAverage(model, 0.25, dtype="bfloat16")
        average.update_parameters(model)
        before = average.module.conv.weight.float()
        change(model)
        average.update_parameters(model)
        expected = torch.lerp(before, model.conv.weight.detach(), 0.25).bfloat16()
        assert torch.equal(average.module.conv.weight, expected)

    def test_mixed_dtypes(self):
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2)])
        model.register_parameter("phase", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
        model.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
        average = ExponentialMovingAverage(model, 0.25)
        average.update_parameters(model)
        first = copy.deepcopy(model)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(2)
        with Calls() as calls:
            average.update_parameters(model)
        assert calls.names["_foreach_lerp_"] == 3
        for (name, mine), before in zip(average.module.named_parameters(), first.parameters(), strict=True):
            assert mine.dtype == before.dtype
            torch.testing.assert_close(mine, before + (2 if name == "codes" else 0.5))


class TestWhatTheModelBecomes:
    """The tensors are looked up once; whatever replaces them must be seen."""

    @staticmethod
    def assert_follows(average: BaseAveragedModel, model: nn.Module) -> None:
        before = copy.deepcopy(average.module)
        average.update_parameters(model)
        for mine, theirs, old in zip(average.module.parameters(), model.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(mine, torch.lerp(old, theirs.detach().to(old.dtype), 0.5))

    @pytest.mark.parametrize(
        "replace",
        [
            lambda model: setattr(model, "fc", nn.Linear(4, 4)),
            lambda model: setattr(model.fc, "bias", nn.Parameter(torch.ones(4))),
            lambda model: setattr(model.fc.bias, "data", torch.ones(4)),
            lambda model: model.load_state_dict(Net(tied=False).state_dict(), assign=True),
            lambda model: model.fc.double(),
            lambda model: model.to(memory_format=torch.channels_last),
        ],
        ids=["module", "parameter", "data", "assign", "dtype of a part", "memory format"],
    )
    def test_it_is_followed(self, replace):
        model = Net(tied=False)
        average = ExponentialMovingAverage(model, 0.5)
        average.update_parameters(model)
        change(model)
        replace(model)
        self.assert_follows(average, model)

    def test_the_average_too(self):
        model = Net(tied=False)
        average = ExponentialMovingAverage(model, 0.5)
        average.update_parameters(model)
        change(model)
        average.double()
        self.assert_follows(average, model)
        average.module.fc = nn.Linear(4, 4, dtype=torch.float64)
        self.assert_follows(average, model)

    def test_another_model_of_its_kind(self):
        average, _ = trained(ExponentialMovingAverage, momentum=0.5)
        self.assert_follows(average, Net())

    def test_a_source_is_not_kept_alive(self):
        average, model = trained(StochasticWeightAverage)
        last = weakref.ref(model.conv.weight)
        del model
        gc.collect()
        assert last() is None
        assert average.steps == 3

    def test_it_goes_on_with_what_an_optimizer_trains(self):
        model = Net()
        optimizer = FusedAdamW(model.parameters(), lr=0.1)
        average, expected = ExponentialMovingAverage(model, 0.25), None
        for _ in range(5):
            model(torch.randn(4, 2, 5, 5)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            value = model.conv.weight.detach().clone()
            expected = value if expected is None else torch.lerp(expected, value, 0.25)
            with average.applied_to(model):
                assert torch.equal(model.conv.weight, average.module.conv.weight)
            assert torch.equal(model.conv.weight, value)
        assert torch.equal(average.module.conv.weight, expected)


class TestAppliedTo:
    def test_the_model_has_the_averages_values_and_then_its_own(self):
        average, model = trained(ExponentialMovingAverage, update_buffers=True)
        own = copy.deepcopy(model.state_dict())
        mean = copy.deepcopy(average.module.state_dict())
        pointers = [each.data_ptr() for each in model.parameters()]
        with average.applied_to(model) as applied:
            assert applied is model
            assert_equal(model.state_dict(), mean)
            assert_equal(average.module.state_dict(), mean)
        assert_equal(model.state_dict(), own)
        assert [each.data_ptr() for each in model.parameters()] == pointers

    def test_it_has_its_own_after_an_exception(self):
        average, model = trained(ExponentialMovingAverage)
        own = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="stop"), average.applied_to(model):
            raise RuntimeError("stop")
        assert_equal(model.state_dict(), own)

    def test_a_float32_average_is_rounded_and_stays(self):
        model = Net().bfloat16()
        average = ExponentialMovingAverage(model, 0.1, dtype=torch.float32)
        for _ in range(3):
            change(model)
            average.update_parameters(model)
        mean = copy.deepcopy(average.module.state_dict())
        with average.applied_to(model):
            assert torch.equal(model.conv.weight, mean["conv.weight"].bfloat16())
        assert_equal(average.module.state_dict(), mean)

    def test_copy_parameters_is_no_update(self):
        average, model = trained(ExponentialMovingAverage, 3)
        change(model)
        average.copy_parameters(model)
        assert_equal(average.module.state_dict(), model.state_dict())
        assert average.steps == 3


class TestCounting:
    """The host counts for itself, and must notice whatever else sets ``steps``."""

    @staticmethod
    def weight_of_next(average: BaseAveragedModel) -> float:
        zero, one = copy.deepcopy(average.module), copy.deepcopy(average.module)
        with torch.no_grad():
            for param in zero.parameters():
                param.zero_()
            for param in one.parameters():
                param.fill_(1)
        average.module.load_state_dict(zero.state_dict())
        average.update_parameters(one)
        return average.module.scale.item()

    @pytest.mark.parametrize(
        "through",
        [
            copy.deepcopy,
            lambda average: pickle.loads(pickle.dumps(average)),
            lambda average: torch.load(saved(average), weights_only=False),
            lambda average: load(StochasticWeightAverage(Net()), average.state_dict()),
            lambda average: load(trained(StochasticWeightAverage, 7)[0], average.state_dict()),
            lambda average: load(StochasticWeightAverage(Net()), average.state_dict(), assign=True),
        ],
        ids=["deepcopy", "pickle", "torch.save", "load_state_dict", "into a used one", "assign"],
    )
    def test_a_copy_goes_on_where_the_original_was(self, through):
        average, _ = trained(StochasticWeightAverage, 4)
        other = through(average)
        assert_equal(other.state_dict(), average.state_dict())
        assert self.weight_of_next(other) == pytest.approx(1 / 5)
        assert self.weight_of_next(other) == pytest.approx(1 / 6)

    def test_steps_set_by_hand(self):
        average, _ = trained(StochasticWeightAverage, 4)
        average.steps.fill_(9)
        assert self.weight_of_next(average) == pytest.approx(1 / 10)
        average.steps = torch.tensor(1)
        assert self.weight_of_next(average) == pytest.approx(1 / 2)
        average.steps.zero_()
        assert self.weight_of_next(average) == 1

    def test_a_copy_of_an_average_does_not_hold_its_source(self):
        average, model = trained(ExponentialMovingAverage)
        size = len(pickle.dumps(average))
        assert size < 1.5 * len(pickle.dumps(ExponentialMovingAverage(model)))


def saved(average: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    return file


def load(average: nn.Module, state: dict[str, Any], assign: bool = False) -> nn.Module:
    average.load_state_dict({name: value.clone() for name, value in state.items()}, assign=assign)
    return average


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (dict(momentum=0.0), ValueError, "Invalid momentum: 0.0; expected a number"),
            (dict(momentum=1.0), ValueError, "Invalid momentum: 1.0; expected a number"),
            (dict(momentum=math.nan), ValueError, "Invalid momentum: nan"),
            (dict(momentum="0.1"), TypeError, "Invalid momentum: '0.1'"),
            (dict(gamma=0), ValueError, "Invalid gamma: 0; expected a number > 0"),
            (dict(interval=0), ValueError, "Invalid interval: 0; expected an integer >= 1"),
            (dict(interval=1.5), TypeError, "interval must be an integer, got 1.5"),
            (dict(interval=True), TypeError, "interval must be an integer, got True"),
            (dict(update_buffers="yes"), TypeError, "update_buffers must be True or False, got 'yes'"),
            (dict(dtype="float23"), ValueError, "Invalid dtype: 'float23'; did you mean 'float32'?"),
            (dict(dtype=torch.int64), ValueError, "Invalid dtype: torch.int64"),
            (dict(dtype=3), TypeError, "dtype must be the name of a dtype"),
            (dict(device="warp:1"), RuntimeError, "warp"),
            (dict(model=[1]), TypeError, "model must be a torch.nn.Module, got list"),
            (dict(model=nn.LazyLinear(3)), ValueError, "parameter 'weight' has no shape yet"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=re.escape(message)):
            MomentumAnnealingEMA(**{"model": nn.Linear(2, 2), **arguments})

    def test_a_decay_in_place_of_a_momentum_is_warned_of(self):
        with pytest.warns(UserWarning, match="for a decay of 0.999 it is 0.001") as caught:
            ExponentialMovingAverage(Net(), 0.999)
        assert [each.filename for each in caught] == [__file__]

    def test_a_class_without_a_formula(self):
        class Nothing(BaseAveragedModel):
            pass

        with pytest.raises(TypeError, match="Nothing has no formula: it must define update_weight or avg_func"):
            Nothing(Net())

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda model: delattr(model.fc, "bias"), "the model has no parameter 'fc.bias', which its average has"),
            (lambda model: delattr(model, "shift"), "the model has no buffer 'shift', which its average has"),
            (
                lambda model: setattr(model, "new", nn.Parameter(torch.ones(1))),
                "the average has no parameter 'new', which the model has",
            ),
            (
                lambda model: setattr(model.fc, "bias", nn.Parameter(torch.ones(1))),
                "parameter 'fc.bias' has shape (1,) in the model but (4,) in its average",
            ),
            (
                lambda model: setattr(model.fc.bias, "data", torch.ones(4, 4)),
                "parameter 'fc.bias' has shape (4, 4) in the model but (4,) in its average",
            ),
            (
                lambda model: setattr(model, "shift", torch.ones(2)),
                "buffer 'shift' has shape (2,) in the model but (4,) in its average",
            ),
            (
                lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(4, 4))),
                "'fc.weight' and 'head.weight' are one parameter in the average but two in the model",
            ),
        ],
    )
    def test_a_model_that_does_not_fit_is_refused_and_nothing_changed(self, spoil, message):
        average, model = trained(ExponentialMovingAverage)
        before = copy.deepcopy(average.state_dict())
        spoil(model)
        change(model)
        for refuses in (
            average.update_parameters,
            average.copy_parameters,
            lambda m: average.applied_to(m).__enter__(),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                refuses(model)
        assert_equal(average.state_dict(), before)

    def test_a_wrapped_model(self):
        average, model = trained(ExponentialMovingAverage)
        wrapper = nn.Module()
        wrapper.module = model
        with pytest.raises(
            ValueError, match=r"no parameter 'scale', which its average has \(it is wrapped: pass model.module\)"
        ):
            average.update_parameters(wrapper)


def test_a_tied_parameter_is_averaged_once():
    model = Net()
    average = ExponentialMovingAverage(model, 0.5)
    average.update_parameters(model)
    before = model.fc.weight.detach().clone()
    change(model)
    average.update_parameters(model)
    assert average.module.head.weight is average.module.fc.weight
    torch.testing.assert_close(average.module.fc.weight, torch.lerp(before, model.fc.weight.detach(), 0.5))


def test_registered_by_name():
    for cls in CLASSES:
        average = MODELS.build(dict(type=cls.__name__, model=Net(), interval=2, dtype="float64"))
        assert type(average) is cls and average.interval == 2
        assert average.module.conv.weight.dtype == torch.float64
    with pytest.raises(KeyError, match="did you mean 'ExponentialMovingAverage'"):
        MODELS.build(dict(type="ExponentialMovingAvg", model=Net()))
    with pytest.raises(TypeError, match=r"momentun.*did you mean 'momentum'"):
        MODELS.build(dict(type="MomentumAnnealingEMA", model=Net(), momentun=0.1))


def test_it_is_called_as_the_model_and_shows_its_settings():
    average, model = trained(MomentumAnnealingEMA, momentum=0.1, interval=2)
    x = torch.randn(3, 2, 5, 5)
    assert torch.equal(average.eval()(x), average.module(x))
    assert not any(param.requires_grad for param in average.parameters())
    assert model.conv.weight.requires_grad
    assert repr(average).splitlines()[1].strip() == "gamma=100, momentum=0.1, interval=2, update_buffers=False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("model_on", "average_on"), [*itertools.product(["cuda", "cpu"], ["cuda", "cpu"])])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_average_and_model_on_a_gpu(model_on, average_on, dtype):
    model = Net()
    reference = ExponentialMovingAverage(model, 0.1, dtype=dtype)
    moving = copy.deepcopy(model).to(model_on)
    average = ExponentialMovingAverage(moving, 0.1, device=average_on, dtype=dtype)
    for number in range(4):
        change(model)
        moving.load_state_dict(model.state_dict())
        reference.update_parameters(model)
        if number and model_on == average_on:
            torch.cuda.set_sync_debug_mode("error")
        average.update_parameters(moving)
        torch.cuda.set_sync_debug_mode("default")
    assert {each.device.type for each in average.parameters()} == {average_on}
    assert_equal(average.cpu().state_dict(), reference.state_dict(), 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports its compiler
def test_a_compiled_model_is_the_model_it_was_made_of() -> None:
    model = nn.Linear(2, 2)
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(torch.compile(model))
    assert torch.equal(average.module.weight, model.weight)


def test_a_model_without_tensors_has_an_average() -> None:
    model = nn.ReLU()
    average = ExponentialMovingAverage(model, momentum=0.5)
    average.update_parameters(model)
    with average.applied_to(model):
        pass
    assert int(average.steps) == 1
