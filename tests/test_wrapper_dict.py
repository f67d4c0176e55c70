"""OptimWrapperDict: several wrappers by name, with the protocol of a dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from fusedopt import AmpOptimWrapper, FusedAdam, FusedSGD, OptimWrapper, OptimWrapperDict


def wrapper(cls=FusedSGD, groups: int = 1, kind=OptimWrapper, **settings) -> OptimWrapper:
    params = [dict(params=[nn.Parameter(torch.ones(2))]) for _ in range(groups)]
    return kind(optimizer=cls(params, lr=0.01), **settings)


@pytest.fixture
def pair() -> OptimWrapperDict:
    return OptimWrapperDict(gen=wrapper(groups=2, clip_grad=dict(max_norm=1.0)), disc=wrapper(FusedAdam))


def step(single: OptimWrapper) -> None:
    single.update_params(
        sum(param.square().sum() for group in single.optimizer.param_groups for param in group["params"])
    )


def test_the_tutorials_fragment(capsys):
    # model1
    gen = nn.Linear(1, 1)
    # model2
    disc = nn.Linear(1, 1)
    # optimizer1
    optimizer_gen = SGD(gen.parameters(), lr=0.01)
    # optimizer2
    optimizer_disc = SGD(disc.parameters(), lr=0.01)
    # wrapper1
    optim_wapper_gen = OptimWrapper(optimizer=optimizer_gen)
    # wrapper2
    optim_wapper_disc = OptimWrapper(optimizer=optimizer_disc)
    # wrapper_dict = wrapper1 + wrapper2
    optim_dict = OptimWrapperDict(gen=optim_wapper_gen, disc=optim_wapper_disc)
    print("wrapper_dict = wrapper1 + wrapper2")
    print(optim_dict.get_lr())  # {'gen.lr': [0.01], 'disc.lr': [0.01]}
    print(optim_dict.get_momentum())  # {'gen.momentum': [0], 'disc.momentum': [0]}
    assert capsys.readouterr().out.splitlines()[1:] == [
        "{'gen.lr': [0.01], 'disc.lr': [0.01]}",
        "{'gen.momentum': [0], 'disc.momentum': [0]}",
    ]


def test_is_an_optim_wrapper_and_a_dict(pair):
    assert isinstance(pair, OptimWrapper)
    assert list(pair) == list(pair.keys()) == ["gen", "disc"] and len(pair) == 2
    assert dict(pair.items()) == {"gen": pair["gen"], "disc": pair["disc"]}
    assert list(pair.values()) == [pair["gen"], pair["disc"]]
    assert "gen" in pair and "generator" not in pair
    with pytest.raises(KeyError, match=r"no optimizer wrapper 'dics'; did you mean 'disc'\?"):
        pair["dics"]


def test_settings_come_by_name(pair):
    assert pair.get_lr() == {"gen.base_lr": [0.01], "gen.lr": [0.01, 0.01], "disc.lr": [0.01]}
    assert pair.get_momentum() == {"gen.momentum": [0, 0], "disc.momentum": [0.9]}
    assert {name: len(groups) for name, groups in pair.param_groups.items()} == {"gen": 3, "disc": 1}
    assert pair.defaults["disc"]["betas"] == (0.9, 0.999)


def test_reports_come_by_name(pair):
    step(pair["gen"])
    assert float(pair.grad_norm["gen"]) == pytest.approx(4.0) and pair.grad_norm["disc"] is None
    assert float(pair.clip_coef["gen"]) == pytest.approx(0.25)
    assert pair.clip_grad["gen"]["max_norm"] == 1.0 and pair.clip_grad["disc"] is None
    assert pair.step_count == {"gen": 1, "disc": 0}
    assert pair.loss_scale == pair.step_was_skipped == {"gen": None, "disc": None}


@pytest.mark.parametrize(
    "call",
    [
        lambda wrappers: wrappers.update_params(torch.ones(())),
        lambda wrappers: wrappers.backward(torch.ones(())),
        lambda wrappers: wrappers.step(),
        lambda wrappers: wrappers.optim_context(nn.Linear(1, 1)),
        lambda wrappers: wrappers.should_update(),
        lambda wrappers: wrappers.should_sync(),
        lambda wrappers: wrappers.scale_loss(torch.ones(())),
        lambda wrappers: wrappers.inner_count,
    ],
)
def test_what_each_wrapper_does_by_itself_is_not_implemented(pair, call):
    with pytest.raises(NotImplementedError, match=r"call it on one of its wrappers, as in optim_wrapper\['gen'\]"):
        call(pair)


def test_zero_grad_acts_on_all_and_count_status_on_none(pair):
    params = [param for single in pair.values() for group in single.optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.ones_like(param)
    pair.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in params)
    pair.zero_grad()
    assert all(param.grad is None for param in params)
    pair.initialize_count_status(nn.Linear(1, 1), 3, 10)
    assert [single.inner_count for single in pair.values()] == [0, 0]


def test_state_dicts_of_all_at_once(pair):
    for single in pair.values():
        step(single)
    saved = pair.state_dict()
    before = copy.deepcopy(saved)
    assert list(saved) == ["gen", "disc"] and "base_param_settings" in saved["gen"]
    # One of them has become AMP meanwhile: fp32 and AMP wrappers load each other's state.
    fresh = OptimWrapperDict(gen=wrapper(groups=2, kind=AmpOptimWrapper), disc=wrapper(FusedAdam))
    fresh.load_state_dict(saved)
    assert str(saved) == str(before)
    loaded = fresh["disc"].state_dict()["state"][0]
    assert all(torch.equal(value, saved["disc"]["state"][0][key]) for key, value in loaded.items())


def test_what_a_state_dict_lacks_is_a_warning(pair):
    with pytest.warns(UserWarning, match="state_dict has nothing for 'gen', which stays as it is"):
        pair.load_state_dict({"disc": pair.state_dict()["disc"]})
    with pytest.warns(UserWarning, match="nothing for 'gen', 'disc'"):
        pair.load_state_dict({})


@pytest.mark.parametrize("kind", [OptimWrapper, AmpOptimWrapper])
@pytest.mark.parametrize("cls", [Adam, FusedAdam])
def test_an_entry_that_is_refused_leaves_those_before_it(cls, kind):
    target, source = (
        OptimWrapperDict(gen=wrapper(cls, groups=2, kind=kind), disc=wrapper(FusedAdam)) for _ in range(2)
    )
    for wrappers, count in ((target, 1), (source, 2)):
        for _ in range(count):
            step(wrappers["gen"])
    saved = source.state_dict()
    saved["gen"]["base_param_settings"]["lr"] = 7.0
    if kind is AmpOptimWrapper:
        saved["gen"]["loss_scaler"]["scale"] = 2.0
    saved["disc"]["param_groups"] = []
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        target.load_state_dict(saved)
    assert str(target.state_dict()) == str(before)
    step(target["gen"])
    assert float(target.state_dict()["gen"]["state"][0]["step"]) == 2


@pytest.mark.parametrize(("state", "name"), [(None, "state_dict"), ({"gen": 1}, r"state_dict\['gen'\]")])
def test_a_state_that_is_no_dict_is_a_type_error(pair, state, name):
    with pytest.raises(TypeError, match=rf"{name} must be a dict, as state_dict\(\) of a wrapper"):
        pair.load_state_dict(state)


def test_the_state_of_a_dict_and_of_a_single_wrapper_do_not_mix(pair):
    with pytest.raises(ValueError, match=r"is from a single wrapper.*one for each of 'gen', 'disc'"):
        pair.load_state_dict(pair["gen"].state_dict())
    for kind in (OptimWrapper, AmpOptimWrapper):
        with pytest.raises(ValueError, match=r"is from an OptimWrapperDict of 'gen', 'disc'; a single"):
            wrapper(kind=kind).load_state_dict(pair.state_dict())


def test_an_unknown_name_loads_nothing(pair):
    saved = pair.state_dict()
    saved["gen"]["param_groups"][0]["lr"] = 0.5
    with pytest.raises(KeyError, match=r"state_dict has 'disk', which is not a wrapper here; did you mean 'disc'\?"):
        pair.load_state_dict({"gen": saved["gen"], "disk": saved["disc"]})
    assert pair.get_lr()["gen.lr"] == [0.01, 0.01]


def test_a_dict_holds_no_dict(pair):
    with pytest.raises(TypeError, match="holds single wrappers, got both=OptimWrapperDict of 'gen', 'disc'"):
        OptimWrapperDict(both=pair)


@pytest.mark.parametrize("name", ["optimizer", "base_param_settings", "_inner_count"])
def test_what_only_a_single_wrapper_has_is_no_attribute(pair, name):
    with pytest.raises(
        AttributeError, match=rf"no {name} of its own: read it from one.*as in optim_wrapper\['gen'\]\.{name}"
    ):
        getattr(pair, name)
    assert not hasattr(pair, name)
    assert list(copy.deepcopy(pair)) == ["gen", "disc"]


def test_holds_wrappers_only():
    with pytest.raises(TypeError, match="OptimWrapperDict holds OptimWrappers, got gen=SGD"):
        OptimWrapperDict(gen=SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_can_be_printed(pair):
    assert repr(pair).startswith("gen: OptimWrapper(accumulative_counts=1, clip_grad={") and "\ndisc: Opt" in repr(pair)


def test_is_described_in_one_table():
    model = nn.ModuleDict(
        dict(gen=nn.Linear(2, 1, bias=False), disc=nn.Linear(1, 1), extra=nn.Linear(1, 1, bias=False))
    )
    wrappers = OptimWrapperDict(
        gen=OptimWrapper(FusedSGD(model.gen.parameters(), lr=0.1)),
        disc=OptimWrapper(SGD(model.disc.parameters(), lr=0.2)),
    )
    assert wrappers.describe(model).splitlines() == [
        "parameter     shape  lr   weight_decay  group",
        "gen.weight    1x2    0.1  0             gen 0",
        "disc.weight   1x1    0.2  0             disc 0",
        "disc.bias     1      0.2  0             disc 0",
        "extra.weight  1x1    -    -             in no group",
        "gen: bytes per parameter: 8 held (parameters 4, gradients 4), 12 moved in a step, 16 in one "
        "that clips or checks",
    ]
    assert "disc 0" in wrappers.describe()
