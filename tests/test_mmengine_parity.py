"""Against MMEngine, with random models, configs and lengths: the same groups, parameters, state dicts, lookups."""

from __future__ import annotations

import copy
import random
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and torch warn of while MMEngine is imported is not ours
    pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
    from mmengine import optim as theirs
    from mmengine.config import ConfigDict
    from mmengine.optim.optimizer import amp_optimizer_wrapper, default_constructor
    from mmengine.registry import Registry as TheirRegistry

import fusedopt
from fusedopt import AmpOptimWrapper, OptimWrapper, OptimWrapperDict, Registry, build_optim_wrapper

# A custom key that matches nothing, and an accumulation that starts in the middle, are warnings here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class DeformConv2d(nn.Module):
    """Stands in for mmcv's class of this name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 2, 3, 3)), nn.Parameter(torch.ones(2))
        self.conv_offset = nn.Conv2d(2, 18, 3)


class ModulatedDeformConv2d(DeformConv2d):
    pass


@pytest.fixture(autouse=True, scope="module")
def mmcv() -> Iterator[None]:
    """mmcv, as far as MMEngine's constructor asks for it."""
    ops = types.ModuleType("mmcv.ops")
    ops.DeformConv2d, ops.ModulatedDeformConv2d = DeformConv2d, ModulatedDeformConv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mmcv.ops", ops)
        patch.setattr(default_constructor, "mmcv_full_available", lambda: True)
        # Its AMP wrapper asserts a GPU.
        patch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
        patch.setattr(amp_optimizer_wrapper, "GradScaler", lambda **kwargs: torch.amp.GradScaler("cpu", **kwargs))
        yield


LEAVES = [
    lambda: nn.Linear(2, 3),
    lambda: nn.Linear(2, 3, bias=False),
    lambda: nn.Conv2d(2, 4, 1),
    lambda: nn.Conv2d(4, 4, 3, groups=4),
    lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    lambda: nn.Conv1d(4, 4, 3, groups=4),
    lambda: nn.BatchNorm2d(3),
    lambda: nn.InstanceNorm1d(3, affine=True),
    lambda: nn.GroupNorm(1, 3),
    lambda: nn.LayerNorm((2, 3)),
    lambda: nn.SyncBatchNorm(2),
    lambda: nn.Embedding(3, 2),
    lambda: nn.PReLU(),
    lambda: nn.MultiheadAttention(2, 1),
    DeformConv2d,
    ModulatedDeformConv2d,
]
NAMES = ["backbone", "head", "norm", "norm1", "layer0", "layer1", "conv_offset", "bias", "attn", "pos", "weight_proj"]
PARAMETERS = ["pos_embed", "cls_token", "scale", "bias", "weight"]


class Node(nn.Module):
    """Parameters of its own, and children."""


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A tree of modules; some parameters are frozen, and maybe one is shared."""
    choose = random.Random(draw(st.integers(0, 2**32)))

    def grow(depth: int) -> nn.Module:
        node = Node()
        for name in choose.sample(PARAMETERS, choose.choice([0, 0, 1, 2])):
            setattr(node, name, nn.Parameter(torch.ones(choose.choice([(), (3,), (1, 2, 3)]))))
        for name in choose.sample([name for name in NAMES if not hasattr(node, name)], choose.randint(1, 3)):
            setattr(node, name, grow(depth - 1) if depth and choose.random() < 0.5 else choose.choice(LEAVES)())
        return node

    model = grow(3)
    params = list(model.named_parameters())
    for _, param in params:
        param.requires_grad_(choose.random() < 0.9)
    if choose.random() < 0.1:
        name, _ = choose.choice(params)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, choose.choice(params)[1])
    if not any(param.requires_grad for param in model.parameters()):
        model.extra = nn.Parameter(torch.ones(2))
    return model


MULTIPLIERS = st.sampled_from([0, 0.0, 0.1, 0.5, 1, 2.0])
KEYS = st.sampled_from(
    [
        "norm",
        "backbone",
        "head",
        "layer",
        ".bias",
        "conv_offset",
        "weight",
        "0",
        "attn.in_proj",
        "pos",
        "cls_token",
        ".scale",
        "backbone.layer0",
    ]
)
ENTRIES = st.fixed_dictionaries(
    {}, optional=dict(lr_mult=MULTIPLIERS, decay_mult=MULTIPLIERS, momentum=MULTIPLIERS, note=st.just("mine"))
)
PARAMWISE = st.fixed_dictionaries(
    {},
    optional=dict(
        custom_keys=st.dictionaries(KEYS, ENTRIES, max_size=4),
        bias_lr_mult=MULTIPLIERS,
        bias_decay_mult=MULTIPLIERS,
        norm_decay_mult=MULTIPLIERS,
        flat_decay_mult=MULTIPLIERS,
        dwconv_decay_mult=MULTIPLIERS,
        dcn_offset_lr_mult=MULTIPLIERS,
        bypass_duplicate=st.booleans(),
    ),
)
# Mostly with the weight decay that multipliers need: without it both raise.
RATES = st.sampled_from([dict(lr=0.1), dict(lr=0.1, weight_decay=0.0), *[dict(lr=0.1, weight_decay=0.05)] * 8])


def described(wrapper: Any, model: nn.Module) -> Any:
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [
        [names[id(param)] for param in group["params"]]
        + sorted((key, value) for key, value in group.items() if key not in ("params", "param_name"))
        for group in wrapper.optimizer.param_groups
    ]
    base = wrapper.base_param_settings
    return groups, base and {**base, "params": None}, wrapper.get_lr(), wrapper.get_momentum()


def attempt(build: Any, model: nn.Module, cfg: Any) -> Any:
    """What came out, or the kind of error."""
    try:
        wrapper = build(model, cfg)
    except (ValueError, TypeError) as error:
        return type(error)
    return described(wrapper, model)


@settings(max_examples=300, deadline=None)
@given(models(), PARAMWISE, RATES)
def test_random_models_and_paramwise_cfgs_give_the_same_groups(model, paramwise_cfg, rates):
    cfg = dict(optimizer=dict(type="SGD", **rates), paramwise_cfg=paramwise_cfg)
    ours = attempt(build_optim_wrapper, model, copy.deepcopy(cfg))
    assert ours == attempt(theirs.build_optim_wrapper, model, ConfigDict(copy.deepcopy(cfg)))


@settings(max_examples=60, deadline=None)
@given(models(), PARAMWISE, RATES)
def test_the_fused_twin_gets_the_same_groups(model, paramwise_cfg, rates):
    built = {}
    for kind in ("SGD", "FusedSGD"):
        cfg = dict(optimizer=dict(type=kind, **rates), paramwise_cfg=paramwise_cfg)
        built[kind] = attempt(build_optim_wrapper, model, cfg)
    if isinstance(built["SGD"], type):
        assert built["FusedSGD"] == built["SGD"]
        return
    for stock, fused in zip(built["SGD"][0], built["FusedSGD"][0], strict=True):
        assert set(map(str, stock)) >= {str(entry) for entry in fused if entry[0] not in ("foreach", "fused")}
    assert built["FusedSGD"][2:] == built["SGD"][2:]


def train(wrapper: Any, model: nn.Module, data: torch.Tensor, start: int, total: int) -> list[tuple[bool, bool, float]]:
    """What the wrapper said in each iteration."""
    if total != -1 or start:
        wrapper.initialize_count_status(model, start, total)
    said = []
    for batch in data:
        sync, factor = wrapper.should_sync(), float(wrapper.scale_loss(torch.tensor(1.0, dtype=torch.float64)))
        with wrapper.optim_context(model):
            loss = (model(batch[:, :3]) - batch[:, 3:]).square().mean()
        wrapper.update_params(loss)
        said.append((sync, wrapper.should_update(), factor))
    return said


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["OptimWrapper", "AmpOptimWrapper"]),
    accumulate=st.integers(1, 7),
    iterations=st.integers(1, 15),
    start=st.integers(0, 9),
    extra=st.one_of(st.none(), st.integers(0, 5)),
    clip_grad=st.sampled_from([None, dict(max_norm=0.3), dict(type="value", clip_value=0.02)]),
)
def test_random_lengths_of_accumulation_give_the_same_parameters(kind, accumulate, iterations, start, extra, clip_grad):
    total = -1 if extra is None else start + iterations + extra
    data = torch.randn(iterations, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes = []
    for classes, optimizer in ((theirs, torch.optim.SGD), (fusedopt, torch.optim.SGD), (fusedopt, fusedopt.FusedSGD)):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        made = optimizer(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        amp = dict(dtype=torch.float64) if kind == "AmpOptimWrapper" and classes is fusedopt else {}
        wrapper = getattr(classes, kind)(
            optimizer=made, accumulative_counts=accumulate, clip_grad=copy.deepcopy(clip_grad), **amp
        )
        if classes is theirs and kind == "AmpOptimWrapper":
            wrapper.optim_context = lambda model, plain=wrapper: OptimWrapper.optim_context(plain, model)
        said = train(wrapper, model, data, start, total)
        outcomes.append((said, wrapper.inner_count, [param.detach().clone() for param in model.parameters()]))
    (said, count, params), *others = outcomes
    for other_said, other_count, other_params in others:
        assert other_said == said and other_count == count
        for one, other in zip(params, other_params, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, params, others[0][2])), "the stock optimizer does the same, bit by bit"


def make(classes: Any, kind: str, optimizer: type, groups: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(groups)))
    params = [dict(params=list(layer.parameters()), lr=0.1 / (1 + index)) for index, layer in enumerate(model)]
    settings = dict(lr=0.1, momentum=0.9) if "SGD" in optimizer.__name__ else dict(lr=0.1)
    return model, getattr(classes, kind)(optimizer=optimizer(params, **settings))


def steps(model: nn.Module, wrapper: Any, count: int) -> None:
    for index in range(count):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(index))
        wrapper.update_params(model(batch).square().mean())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", ["OptimWrapper", "AmpOptimWrapper"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("fused", [False, True])
def test_state_dicts_go_from_theirs_to_ours_and_back(name, fused, kind, groups):
    stock = getattr(torch.optim, name)
    own = getattr(fusedopt, f"Fused{name}") if fused else stock
    model, source = make(theirs, kind, stock, groups)
    steps(model, source, 3)
    saved = source.state_dict()

    ours_model, ours = make(fusedopt, kind, own, groups)
    ours_model.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(saved))
    assert ours.state_dict().keys() == saved.keys()
    assert {key: str(value) for key, value in (ours.base_param_settings or {}).items()} == {
        key: str(value) for key, value in (source.base_param_settings or {}).items()
    }
    back_model, back = make(theirs, kind, stock, groups)
    back_model.load_state_dict(model.state_dict())
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    # All three go on alike.
    for each, wrapper in ((model, source), (ours_model, ours), (back_model, back)):
        steps(each, wrapper, 3)
    for expected, middle, last in zip(
        model.parameters(), ours_model.parameters(), back_model.parameters(), strict=True
    ):
        torch.testing.assert_close(middle, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-8)


def test_state_dicts_of_a_dict_go_both_ways():
    sides = {}
    for classes in (theirs, fusedopt):
        parts = {name: make(classes, "OptimWrapper", torch.optim.Adam, groups) for name, groups in (("g", 2), ("d", 1))}
        wrappers = classes.OptimWrapperDict(**{name: wrapper for name, (_, wrapper) in parts.items()})
        for model, wrapper in parts.values():
            steps(model, wrapper, 2 if classes is theirs else 1)
        sides[classes] = wrappers
    stock, ours = sides[theirs], sides[fusedopt]
    assert type(ours) is OptimWrapperDict
    assert ours.get_lr() == stock.get_lr() and list(ours.get_lr()) == list(stock.get_lr())
    assert ours.get_momentum() == stock.get_momentum()
    assert list(ours.param_groups) == list(stock.param_groups)
    ours.load_state_dict(stock.state_dict())
    assert str(ours.state_dict()) == str(stock.state_dict())
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert str(ours.state_dict()) == str(stock.state_dict())


def test_amp_and_fp32_states_mix_as_there():
    for classes in (theirs, fusedopt):
        _, plain = make(classes, "OptimWrapper", torch.optim.SGD, 2)
        _, amp = make(classes, "AmpOptimWrapper", torch.optim.SGD, 2)
        amp.load_state_dict(plain.state_dict())
    assert isinstance(amp, AmpOptimWrapper)


def build_tree(cls: type) -> dict[str, Any]:
    root = cls("tool", scope="root")
    left, right = cls("tool", parent=root, scope="left"), cls("tool", parent=root, scope="right")
    leaf = cls("tool", parent=left, scope="leaf")
    root.register_module(name="Hammer", module=int)
    left.register_module(name=["Saw", "saw"], module=float)
    right.register_module(name="Saw", module=str)
    leaf.register_module(name="Drill", module=list)
    return dict(root=root, left=left, right=right, leaf=leaf)


@pytest.mark.parametrize(
    "key",
    ["Hammer", "Saw", "saw", "Drill", "Nail", "left.Saw", "right.Saw", "left.Hammer", "leaf.Drill", "root.Hammer",
     "left.leaf.Drill", "middle.Saw", "torch.optim.AdamW", "fractions.Fraction"],
)  # fmt: skip
def test_lookups_in_a_tree_of_registries(key):
    ours, stock = build_tree(Registry), build_tree(TheirRegistry)
    for scope in ours:
        found, expected = ours[scope].get(key), stock[scope].get(key)
        if key == "leaf.Drill" and scope in ("root", "right"):
            # MMEngine looks for a scope in the children of the registry and of the root only; here it is anywhere.
            assert expected is None
            expected = list
        assert found is expected, f"{scope}.get({key!r})"
        assert (key in ours[scope]) == (found is not None)
