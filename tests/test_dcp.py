"""Checkpoints of torch.distributed.checkpoint: saved to files and loaded by all its functions, as stock optimizers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import backend_name as name_of
from cases import bits, each_backend, set_gradients, whole_state
from torch import nn

import fusedopt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*single process.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),  # torch 2.8 uses it itself
]

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (fusedopt.FusedSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-momentum": (fusedopt.FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (fusedopt.FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adam": (fusedopt.FusedAdam, torch.optim.Adam, {"lr": 0.01}),
    "adamw-amsgrad": (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
}


class Model(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.first.bias.requires_grad_(False)

    def trainable(self) -> list[nn.Parameter]:
        return [param for param in self.parameters() if param.requires_grad]


@functools.cache
def takes_fewer_entries() -> bool:
    """Whether this torch loads a state that lacks a parameter, in 2.8 and 2.9 a KeyError for any optimizer."""
    model = Model(0)
    stock = torch.optim.SGD(model.trainable(), lr=0.1, momentum=0.9)
    saved: Any = state_dict.get_optimizer_state_dict(model, stock)
    del saved["state"]["second.bias"]
    try:
        state_dict.set_optimizer_state_dict(model, stock, saved, options=state_dict.StateDictOptions(strict=False))
    except KeyError:
        return False
    return True


def both_functions(model: nn.Module, optimizer: Any, options: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    model_state, optim_state = state_dict.get_state_dict(model, optimizer, options=options)

    def load(saved: Any) -> None:
        state_dict.set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optim"], options=options
        )

    return {"model": model_state, "optim": optim_state}, load


def single_functions(model: nn.Module, optimizer: Any, options: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    saved = {
        "model": state_dict.get_model_state_dict(model, options=options),
        "optim": state_dict.get_optimizer_state_dict(model, optimizer, options=options),
    }

    def load(saved: Any) -> None:
        state_dict.set_model_state_dict(model, saved["model"], options=options)
        state_dict.set_optimizer_state_dict(model, optimizer, saved["optim"], options=options)

    return saved, load


FUNCTIONS = {"state_dict": both_functions, "optimizer_state_dict": single_functions}

each_way = [
    pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"]),
    pytest.mark.parametrize("functions", FUNCTIONS),
    pytest.mark.parametrize("kind", KINDS),
]


def through_a_file(
    path: Path, functions: str, flat: bool, source: tuple[Model, Any], target: tuple[Model, Any]
) -> dict[str, Any]:
    """Save one and load it into the other; the state dict that was saved."""
    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved, _ = FUNCTIONS[functions](*source, options)
    dcp.save(saved, checkpoint_id=path, no_dist=True)
    wanted, load = FUNCTIONS[functions](*target, options)
    dcp.load(wanted, checkpoint_id=path, no_dist=True)
    load(wanted)
    return saved


def tensors(saved: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(saved, torch.Tensor):
        return {prefix: saved}
    items = saved.items() if isinstance(saved, dict) else enumerate(saved) if isinstance(saved, list) else ()
    return {name: value for key, each in items for name, value in tensors(each, f"{prefix}.{key}").items()}


def step(model: Model, optimizer: Any, seed: int) -> None:
    set_gradients(model.trainable(), seed)
    optimizer.step()
    optimizer.zero_grad()


def assert_same_course(pairs: list[tuple[Model, Any]], **tolerance: float) -> None:
    for seed in range(20, 24):
        for model, optimizer in pairs:
            step(model, optimizer, seed)
    (expected, _), *others = pairs
    for model, _ in others:
        for param, want in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(param, want, **tolerance)


def make(kind: str, seed: int, *, stock: bool = False, of: list[str] | None = None, **extra: Any) -> tuple[Model, Any]:
    fused, twin, settings = KINDS[kind]
    model = Model(seed)
    given: Any = model.parameters()
    if of == ["frozen too"]:
        given = list(model.named_parameters())
    return model, (twin(given, **settings, foreach=False) if stock else fused(given, **settings, **extra))


@each_way[0]
@each_way[1]
@each_way[2]
@pytest.mark.parametrize("names", [None, ["frozen too"]], ids=["unnamed", "named"])
def test_a_training_resumes_from_a_file(kind: str, functions: str, flat: bool, names: Any, tmp_path: Path) -> None:
    ours, theirs = make(kind, 0, of=names), make(kind, 0, stock=True, of=names)
    for seed in range(3):
        step(*ours, seed)
        step(*theirs, seed)
    resumed = make(kind, 1, of=names)
    saved = through_a_file(tmp_path / "ours", functions, flat, ours, resumed)
    stock_saved = through_a_file(tmp_path / "theirs", functions, flat, theirs, make(kind, 1, stock=True, of=names))
    assert tensors(saved).keys() == tensors(stock_saved).keys()
    assert bits(resumed[0].parameters()) == bits(ours[0].parameters())
    assert all("step" not in state for state in ours[1].state.values()) or "adam" in kind
    assert_same_course([theirs, ours, resumed], rtol=1e-5, atol=1e-6)
    assert bits(resumed[0].parameters()) == bits(ours[0].parameters())


@each_way[0]
@each_way[2]
def test_a_checkpoint_goes_both_ways_between_torchs_optimizer_and_ours(kind: str, flat: bool, tmp_path: Path) -> None:
    ours, theirs = make(kind, 0), make(kind, 0, stock=True)
    for seed in range(3):
        step(*ours, seed)
        step(*theirs, seed)
    to_ours, to_theirs = make(kind, 1), make(kind, 1, stock=True)
    through_a_file(tmp_path / "theirs", "state_dict", flat, theirs, to_ours)
    through_a_file(tmp_path / "ours", "state_dict", flat, ours, to_theirs)
    assert_same_course([theirs, to_ours, to_theirs], rtol=1e-5, atol=1e-6)


@each_way[0]
@each_way[1]
@each_way[2]
def test_before_the_first_step_as_stock(kind: str, functions: str, flat: bool, tmp_path: Path) -> None:
    ours, theirs = make(kind, 0), make(kind, 0, stock=True)
    resumed, stock_resumed = make(kind, 1), make(kind, 1, stock=True)
    saved = through_a_file(tmp_path / "ours", functions, flat, ours, resumed)
    stock_saved = through_a_file(tmp_path / "theirs", functions, flat, theirs, stock_resumed)
    assert {name: value.tolist() for name, value in tensors(saved["optim"]).items()} == {
        name: value.tolist() for name, value in tensors(stock_saved["optim"]).items()
    }
    assert_same_course([stock_resumed, resumed], rtol=1e-5, atol=1e-6)


@each_backend
@each_way[0]
@each_way[1]
@each_way[2]
def test_after_skipped_steps_only_there_are_zeros(
    kind: str, functions: str, flat: bool, backend: str, tmp_path: Path
) -> None:
    ours = make(kind, 0, backend=name_of(backend))
    before = bits(ours[0].parameters())
    for seed in range(2):
        set_gradients(ours[0].trainable(), seed)
        ours[0].first.weight.grad[0, 0] = torch.inf
        ours[1].step(grad_scale=2.0)
        ours[1].zero_grad()
    assert bits(ours[0].parameters()) == before
    assert ours[1].state_dict()["state"] == {}, "to anybody else, nothing has happened"
    resumed = make(kind, 1, backend=name_of(backend))
    saved = through_a_file(tmp_path / "ours", functions, flat, ours, resumed)
    theirs = make(kind, 0, stock=True)
    assert tensors(saved).keys() == tensors(FUNCTIONS[functions](*theirs, options_for(flat))[0]).keys()
    assert all(not value.any() for name, value in tensors(saved["optim"]).items() if "step" not in name)
    # Without dampening, zeros before the first step are the first step. With it, stock and ours take them for real.
    fresh = make(kind, 0, stock=True)
    if kind == "sgd-dampening":
        for param in fresh[0].trainable():
            fresh[1].state[param]["momentum_buffer"] = torch.zeros_like(param)
    if backend == "reference" and "adam" in kind:
        # It makes no state for a step that is skipped, so torch has made it by a step without gradients, as for stock.
        through_a_file(tmp_path / "fresh", functions, flat, make(kind, 0, stock=True), fresh)
    assert_same_course([fresh, resumed], rtol=1e-5, atol=1e-6)


def options_for(flat: bool) -> Any:
    return state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)


@each_way[0]
@pytest.mark.parametrize("kind", ["sgd-momentum", "adam"])
def test_a_parameter_that_has_not_stepped_yet(kind: str, flat: bool) -> None:
    """Trainable, without a gradient so far: no entry, which the flat form makes one of empty dicts."""
    if not takes_fewer_entries():
        pytest.skip("this torch's set_optimizer_state_dict needs an entry for each parameter")
    ours = make(kind, 0)
    for seed in range(2):
        set_gradients(ours[0].trainable(), seed)
        ours[0].second.bias.grad = None
        ours[1].step()
    ours[1].zero_grad()
    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    saved, _ = both_functions(*ours, options)
    resumed = make(kind, 1)
    _, load = both_functions(*resumed, options)
    load(saved)
    assert not resumed[1].state.get(resumed[0].second.bias)
    assert_same_course([ours, resumed], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sgd-momentum", "adam"])
def test_half_an_entry_is_an_error(kind: str) -> None:
    ours = make(kind, 0)
    step(*ours, 0)
    saved, _ = both_functions(*ours, options_for(True))
    key = "momentum_buffer" if "sgd" in kind else "exp_avg_sq"
    resumed = make(kind, 1)
    step(*resumed, 1)
    _, load = both_functions(*resumed, options_for(True))
    before = [
        {name: value.tolist() for name, value in whole_state(resumed[1], p).items()} for p in resumed[0].trainable()
    ]
    saved["optim"][f"state.first.weight.{key}"] = {"a": torch.ones(1)}
    with pytest.raises(ValueError, match=rf"loaded state '{key}' of parameter .*\[0\].* is .*; expected a tensor"):
        load(saved)
    if "adam" in kind:
        del saved["optim"][f"state.first.weight.{key}"]
        ours_refuses = rf"loaded state '{key}' of parameter .* is \{{\}}; expected a tensor"
        error, message = (ValueError, ours_refuses) if takes_fewer_entries() else (KeyError, key)
        with pytest.raises(error, match=message):
            load(saved)
    after = [
        {name: value.tolist() for name, value in whole_state(resumed[1], p).items()} for p in resumed[0].trainable()
    ]
    assert after == before


def test_names_in_the_nested_form_do_not_sort_what_is_sorted_already() -> None:
    """torch sorts the parameters, but not the list of their names."""
    model, other = Model(0), Model(0)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    donor = fusedopt.FusedSGD(named, lr=0.1, momentum=0.9)
    step(model, donor, 0)
    saved = state_dict.get_optimizer_state_dict(model, donor)
    turned = [(name, param) for name, param in other.named_parameters() if param.requires_grad][::-1]
    optimizer = fusedopt.FusedSGD(turned, lr=0.1, momentum=0.9)
    state_dict.set_optimizer_state_dict(other, optimizer, saved)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in turned]
    for (_, mine), (_, theirs) in zip(turned[::-1], named, strict=True):
        assert torch.equal(optimizer.state[mine]["momentum_buffer"], donor.state[theirs]["momentum_buffer"])
    unnamed = fusedopt.FusedSGD([param for _, param in turned], lr=0.1, momentum=0.9)
    state_dict.set_optimizer_state_dict(other, unnamed, saved)
    assert "param_names" not in unnamed.param_groups[0]


#: Ways to keep state in fewer bits, of bfloat16 parameters.
KEPT: dict[str, dict[str, Any]] = {
    "int8-split": dict(state_dtype="int8", master="split", ema={"decay": 0.9}),
    "int8-split8": dict(state_dtype="int8", master="split8", stochastic_rounding={"seed": 1}, ema={"decay": 0.9}),
    "float16-master": dict(state_dtype="float16", master="float32", ema={"decay": 0.9}),
}


def kept_with(kind: str, kept: dict[str, Any], seed: int) -> tuple[Model, Any]:
    fused, _, settings = KINDS[kind]
    model = Model(seed).to(torch.bfloat16)
    return model, fused(model.parameters(), **settings, **kept)


@each_way[0]
@each_way[1]
@pytest.mark.parametrize("kind", ["sgd-momentum", "adamw-amsgrad"])
@pytest.mark.parametrize("kept", KEPT)
def test_state_in_fewer_bits_comes_back_as_it_was(
    kept: str, kind: str, functions: str, flat: bool, tmp_path: Path
) -> None:
    ours = kept_with(kind, KEPT[kept], 0)
    for seed in range(3):
        step(*ours, seed)
    resumed = kept_with(kind, KEPT[kept], 1)
    saved = through_a_file(tmp_path, functions, flat, ours, resumed)
    names = {name.rpartition(".")[2] for name in tensors(saved["optim"])}
    assert names <= {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "master", "ema"}
    for seed in range(3, 6):
        for param, twin in zip(ours[0].trainable(), resumed[0].trainable(), strict=True):
            assert bits([twin]) == bits([param])
            # A master waits in its own form for the step that needs it.
            forms = {"master", "master_low"}
            mine, its = (whole_state(each[1], p) for each, p in ((ours, param), (resumed, twin)))
            for key in (mine.keys() | its.keys()) - (forms if seed == 3 else set()):
                assert bits([its[key]]) == bits([mine[key]]), key
        step(*ours, seed)
        step(*resumed, seed)


@each_way[0]
@pytest.mark.filterwarnings("ignore:fusedopt.+kept as:UserWarning")
@pytest.mark.parametrize("after", KEPT)
@pytest.mark.parametrize("before", KEPT)
def test_any_form_goes_through_a_file_into_any_other(before: str, after: str, flat: bool, tmp_path: Path) -> None:
    ours = kept_with("adam", KEPT[before], 0)
    for seed in range(3):
        step(*ours, seed)
    other = kept_with("adam", KEPT[after], 1)
    through_a_file(tmp_path, "state_dict", flat, ours, other)
    exact, again = ours[1].master_weights(), other[1].master_weights()
    for param, twin in zip(ours[0].trainable(), other[0].trainable(), strict=True):
        torch.testing.assert_close(again[twin], exact[param], rtol=2**-15 if "split8" in after else 0, atol=0)
        assert torch.equal(other[1].averages()[twin], ours[1].averages()[param])
    step(*other, 3)
