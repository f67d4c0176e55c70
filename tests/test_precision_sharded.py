"""Two processes: state in fewer bits of sharded models, in state dicts and checkpoints that others can read."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import bits
from sharded_cases import MARKS, Model, Outcomes, full, local, run, shard

import fusedopt

pytestmark = MARKS
WORLD = 2
KEPT: dict[str, Any] = dict(state_dtype="int8", master="split", ema={"decay": 0.9}, lr=0.05)
BF16 = torch.bfloat16


def give_gradients(params: list[Any], seed: int) -> None:
    """The same for all processes where they share a parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for number, param in enumerate(params):
        generator = torch.Generator().manual_seed(seed * 100 + number)
        whole = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            whole = distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
        if getattr(param, "_fsdp_flattened", False):
            whole[-2:] = 0  # where the last process may have padding
        param.grad = whole


def step(params: list[Any], optimizer: Any, *seeds: int) -> None:
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()


def local_state(optimizer: Any, params: list[Any]) -> list[Any]:
    found = [{key: bits([local(value)]) for key, value in optimizer.state[param].items()} for param in params]
    return [bits([local(param) for param in params]), *found]


def sharded(kind: str, folder: str | None = None) -> dict[str, Any]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    models = [shard(kind, Model(dtype=BF16)).model for _ in range(3)]
    params, again, third = (list(model.parameters()) for model in models)
    ours = fusedopt.FusedAdamW(params, **KEPT)
    step(params, ours, 0, 1, 2)
    saved = ours.state_dict()["state"]
    result: dict[str, Any] = {"keys": {key for entry in saved.values() for key in entry}}
    result["dealt out"] = all(
        type(entry[key]) is type(param) and entry[key].shape == param.shape and entry[key].dtype == torch.float32
        for entry, param in zip(saved.values(), params, strict=True)
        if type(param).__name__ == "DTensor"
        for key in ("exp_avg", "exp_avg_sq", "master", "ema")
    )
    # The same shards: the same codes.
    with torch.no_grad():
        for mine, given in zip(again, params, strict=True):
            local(mine).copy_(local(given))
    resumed = fusedopt.FusedAdamW(again, **KEPT)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    result["silent"] = not [each for each in said if "fusedopt" in str(each.message)]
    step(params, ours, 3)
    step(again, resumed, 3)
    result["resumed"] = local_state(ours, params) == local_state(resumed, again)
    before = local_state(ours, params)
    with ours.averaged():
        result["averaged"] = bits([local(param) for param in params]) != before[0]
    result["restored"] = local_state(ours, params) == before
    # Through files, into other shards: each parameter whole.
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        place = f"{folder}/{kind}-{flat}"
        model_state, state = get_state_dict(models[0], ours, options=options)
        dcp.save({"model": model_state, "optim": state}, checkpoint_id=place)
        other = Model(dtype=BF16)
        whole = fusedopt.FusedAdamW(other.parameters(), **KEPT)
        wanted = dict(zip(("model", "optim"), get_state_dict(other, whole, options=options), strict=True))
        dcp.load(wanted, checkpoint_id=place)
        set_state_dict(
            other, whole, model_state_dict=wanted["model"], optim_state_dict=wanted["optim"], options=options
        )
        masters = {name: full(each) for name, each in by_name(models[0], ours.master_weights()).items()}
        averages = {name: full(each) for name, each in by_name(models[0], ours.averages()).items()}
        result[f"masters {flat}"] = same(masters, by_name(other, whole.master_weights()))
        result[f"averages {flat}"] = same(averages, by_name(other, whole.averages()))
        step(list(other.parameters()), whole, 4)
    # Whole, as the first process would save it, and dealt out again.
    options = StateDictOptions(full_state_dict=True)
    model_state, state = get_state_dict(models[0], ours, options=options)
    last = fusedopt.FusedAdamW(third, **KEPT)
    set_state_dict(models[2], last, model_state_dict=model_state, optim_state_dict=state, options=options)
    step(params, ours, 5)
    step(third, last, 5)
    result["full"] = local_state(ours, params) == local_state(last, third)
    return result


def by_name(model: Any, tensors: dict[Any, Any]) -> dict[str, Any]:
    return {name: tensors[param] for name, param in model.named_parameters()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], full(right[name])) for name in left)


def flat_shards(kind: str) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    models = [shard(kind, Model(dtype=BF16)).model for _ in range(2)]
    params, again = (list(model.parameters()) for model in models)
    ours = fusedopt.FusedAdamW(params, **KEPT)
    step(params, ours, 0, 1)
    saved = FullyShardedDataParallel.optim_state_dict(models[0], ours)
    result = {"keys": {key for entry in saved["state"].values() for key in entry}}
    with torch.no_grad():
        for mine, given in zip(again, params, strict=True):
            mine.copy_(given)
    resumed = fusedopt.FusedAdamW(again, **KEPT)
    resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(models[1], resumed, saved))
    step(params, ours, 2)
    step(again, resumed, 2)
    result["resumed"] = bits(params) == bits(again)
    masters = zip(ours.master_weights().values(), resumed.master_weights().values(), strict=True)
    result["masters"] = all(torch.equal(one, other) for one, other in masters)
    return result


def shares() -> dict[str, Any]:
    models = [Model(dtype=BF16) for _ in range(2)]
    params, again = (list(model.parameters()) for model in models)
    ours = fusedopt.ZeroRedundancyOptimizer(params, "FusedAdamW", **KEPT)
    step(params, ours, 0, 1)
    box = [ours.state_dict()]
    dist.broadcast_object_list(box)
    with torch.no_grad():
        for mine, given in zip(again, params, strict=True):
            mine.copy_(given)
    resumed = fusedopt.ZeroRedundancyOptimizer(again, "FusedAdamW", **KEPT)
    resumed.load_state_dict(box[0])
    step(params, ours, 2)
    step(again, resumed, 2)
    own = [(ours.optim, [p for group in ours.optim.param_groups for p in group["params"]])]
    own += [(resumed.optim, [p for group in resumed.optim.param_groups for p in group["params"]])]
    (one, its), (other, theirs) = own
    return {
        "keys": {key for entry in box[0]["state"].values() for key in entry},
        "resumed": local_state(one, its) == local_state(other, theirs) and bits(params) == bits(again),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder: Path = tmp_path_factory.mktemp("precision")
    scenarios: Any = {kind: (Alone(sharded), (kind, str(folder))) for kind in ("fsdp", "tp")}
    scenarios |= {kind: (Alone(flat_shards), (kind,)) for kind in ("fsdp1-flat",)}
    scenarios["zero"] = (Alone(shares), ())
    return run(scenarios, WORLD, folder)


class Alone:
    """A scenario that does not need to be told which process it is in."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, rank: int, *arguments: Any) -> Any:
        return self._function(*arguments)


MOMENTS = {"step", "exp_avg", "exp_avg_sq", "master", "ema"}


def test_sharded_models(outcomes: Outcomes) -> None:
    for kind in ("fsdp", "tp"):
        for found in outcomes[kind]:
            keys = found.pop("keys")
            if kind == "fsdp":
                assert keys == MOMENTS
                assert found.pop("dealt out")
            found.pop("dealt out", None)
            assert found == dict.fromkeys(found, True), kind


def test_flat_shards(outcomes: Outcomes) -> None:
    """Of FullyShardedDataParallel with use_orig_params, torch loses part of any optimizer's state on a CPU."""
    for found in outcomes["fsdp1-flat"]:
        assert found == {"keys": MOMENTS, "resumed": True, "masters": True}


def test_shares_of_an_optimizer(outcomes: Outcomes) -> None:
    for found in outcomes["zero"]:
        assert found["keys"] == {"step", "exp_avg_codes", "exp_avg_sq_codes", "codes_shape", "master_low", "ema"}
        assert found["resumed"]
