"""Two processes: sharded models whose optimizer clips and skips by what all of them found.

Long because its processes, whose start takes longest, are started once for all of it.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed
from cases import HAS_EMULATOR, INF
from sharded_cases import (
    MARKS,
    TOLERANCE,
    Case,
    Outcomes,
    Result,
    alone,
    assert_close,
    assert_equal,
    assert_reports,
    assert_skipped,
    batches,
    each_of,
    full,
    local,
    loss_of,
    mesh_of,
    optimizer_of,
    outcomes_of,
    overflowed,
    plant,
    refused,
    report_of,
    scaler_of,
    shard,
    snapshot,
    stock_clip,
    train,
    trained,
    unequal,
)

import fusedopt

pytestmark = MARKS
WORLD = 2

CLIP = dict(max_norm=0.3)
SGD = dict(optimizer="SGD", settings=dict(lr=0.05, momentum=0.9, weight_decay=0.1))
PLAIN_SGD = dict(optimizer="SGD", settings=dict(lr=0.05))
AMSGRAD = dict(optimizer="Adam", settings=dict(lr=0.05, amsgrad=True))

#: How models of fully_shard are trained.
TRAINED: dict[str, Case] = {
    "unclipped": Case(),
    "clipped": Case(clip=CLIP),
    "barely-clipped": Case(clip=dict(max_norm=100.0)),
    "norm-1": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1)),
    "norm-3": Case(**AMSGRAD, clip=dict(max_norm=0.1, norm_type=3.0)),
    "norm-inf": Case(**PLAIN_SGD, clip=dict(max_norm=0.05, norm_type="inf")),
    "only-report": Case(clip=dict(max_norm=INF)),
    "tensor-max-norm": Case(**SGD, clip=dict(max_norm=torch.tensor(0.3, dtype=torch.float64))),
    "value": Case(**AMSGRAD, clip=dict(type="value", clip_value=0.02)),
    "plain-momentum": Case(**SGD),
    "plain-sgd": Case(**PLAIN_SGD, clip=CLIP),
    "frozen": Case(clip=CLIP, frozen=("up.weight", "down.bias", "head.weight")),
    "unused": Case(clip=CLIP, unused=True),
    "accumulated": Case(clip=CLIP, accumulate=2),
    "scheduled": Case(**SGD, clip=CLIP, scheduled=True),
    "tensor-lr": Case(settings=dict(lr=torch.tensor(0.05, dtype=torch.float64)), clip=CLIP, scheduled=True),
    "closure": Case(clip=CLIP, closure=True),
    "hooks": Case(**SGD, clip=CLIP, hooks=True),
    "written-back": Case(**SGD, clip=CLIP, write_back=True),
    "written-back-values": Case(clip=dict(type="value", clip_value=0.02), write_back=True),
    "float32": Case(clip=CLIP, dtype=torch.float32),
    "reference": Case(clip=CLIP, backend="reference", write_back=True),
    "reference-norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf"), backend="reference"),
}
if HAS_EMULATOR:
    for emulated in ("emulated", "emulated-pair"):
        TRAINED |= {
            f"{emulated}": Case(clip=CLIP, backend=emulated, write_back=True),
            f"{emulated}-norm-1": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1), backend=emulated, unused=True),
            f"{emulated}-norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf"), backend=emulated),
        }


SCENARIOS: dict[str, Any] = {f"fsdp-{name}": (trained, ("fsdp", case)) for name, case in TRAINED.items()}
# What differs between ways to shard is whom a step asks, and what for.
OTHERS = ["clipped", "norm-3", "norm-inf", "value", "scheduled"]
MORE = ["norm-1", "only-report", "tensor-max-norm", "plain-sgd", "closure", "hooks", "reference"]
OF_SHARDINGS = {
    "tp": [*OTHERS, *MORE, "frozen", "written-back", "emulated", "emulated-pair-norm-1"],
    "fsdp1": [*OTHERS, *MORE, "frozen"],
    "fsdp1-flat": ["clipped", "norm-inf"],
    "fsdp1-none": ["clipped", "norm-inf"],
    "zero": [*OTHERS, *MORE],
    "zero-torch": [*OTHERS, *MORE],
}
for sharding, names in OF_SHARDINGS.items():
    SCENARIOS |= {f"{sharding}-{name}": (trained, (sharding, TRAINED[name])) for name in names if name in TRAINED}
TRAININGS = list(SCENARIOS)

OVERFLOWS = {
    f"overflow-{sharding}-{scaler}-{name}-{at}{'-by-hand' if by_hand else ''}": (
        overflowed,
        (sharding, TRAINED[name], scaler, at, by_hand),
    )
    for sharding in ("fsdp", "tp", "fsdp1", "fsdp1-flat", "fsdp1-none", "zero", "zero-torch")
    for scaler in ("ours", "stock", "sharded")
    for name, at, by_hand in (
        ("unclipped", 0, False),
        ("clipped", 0, False),
        ("plain-momentum", 2, False),
        ("reference", 2, False),
        ("clipped", 2, True),
    )
    if not (sharding in ("fsdp1-flat", "fsdp1-none") and (name in ("unclipped", "reference") or scaler == "sharded"))
    # torch's functions for scalers take no plain gradients beside those of DTensors.
    if sharding != "tp" or (scaler == "ours" and not by_hand)
}
SCENARIOS |= OVERFLOWS


def mixed(rank: int, clip: dict[str, Any] | None) -> dict[str, Result]:
    """In bfloat16, and with torch's own clipping and optimizer for comparison."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    case = Case(clip=clip, dtype=torch.float32)
    results = {}
    for fused in (True, False):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        sharded = shard("fsdp", case.model(), mp_policy=policy)
        params = list(sharded.model.parameters())
        data = [batch.bfloat16() for batch in batches()]
        optimizer = (case.fused if fused else case.stock)(params)
        results["fused" if fused else "stock"] = train(case, sharded, optimizer, data, fused=fused)
    return results


def nonfinite(rank: int, kind: str, case: Case) -> dict[str, Any]:
    """One element in one process is not a number."""
    case = dataclasses.replace(case, clip={**case.clip, "error_if_nonfinite": True})
    sharded = shard(kind, case.model())
    optimizer = optimizer_of(kind, case, sharded)
    outcome: dict[str, Any] = {"refused": [], "unchanged": []}
    data = batches(2)
    for batch in data:
        optimizer.zero_grad()
        loss_of(sharded.model, sharded.part(batch)).backward()
        grads = [local(param.grad) for param in sharded.model.parameters() if param.grad is not None]
        kept = [grad.clone() for grad in grads]
        before = snapshot(optimizer)
        plant(sharded, kind, rank == WORLD - 1, math.nan)
        outcome["refused"].append(refused(optimizer.step))
        assert_equal(snapshot(optimizer)[0], before[0])
        for grad, value in zip(grads, kept, strict=True):
            grad.copy_(value)
        optimizer.step()
    return {**outcome, "parameters": sharded.parameters()}


def alone_in_a_process(rank: int, kind: str, case: Case, scaler: str | None) -> dict[str, Any]:
    """Only some processes have a part of what is trained."""
    sharded = shard(kind, case.model())
    model = sharded.model
    params = [model.norm.weight] if kind == "fsdp1" else [model.head.weight, model.head.bias]
    optimizer = case.fused(params)
    amp = scaler_of(scaler) if scaler else None
    reports = []
    for batch in batches():
        model.zero_grad()
        loss = loss_of(model, sharded.part(batch))
        (amp.scale(loss) if amp else loss).backward()
        if amp:
            amp.step(optimizer)
            amp.update()
        else:
            optimizer.step()
        reports.append(report_of(optimizer))
    elements = sum(local(param).numel() for param in params)
    return {"parameters": sharded.parameters(), "reports": reports, "elements": elements}


def no_gradients(rank: int, case: Case, scaled: bool) -> list[Any]:
    """One process has none at all."""
    sharded = shard("fsdp", case.model())
    optimizer = case.fused(sharded.model.parameters())
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    if rank:
        optimizer.zero_grad()
    optimizer.step(grad_scale=2.0 if scaled else None)
    return [report_of(optimizer), [local(param.detach()).clone() for param in sharded.model.parameters()]]


def nothing_in_a_process(rank: int, scaler: str) -> dict[str, Any]:
    """The only parameter lies in the first process, and the other has no gradient for its scaler to look at."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = torch.nn.Linear(1, 1, bias=False)
    model = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = fusedopt.FusedSGD(model.parameters(), lr=0.1, clip_grad=CLIP)
    scaling = scaler_of(scaler)
    outcome: dict[str, Any] = {"steps": []}
    for value in (1.0, INF, 1.0):
        scaling.scale(model(torch.full((1, 1), value)).sum()).backward()
        outcome["gradients"] = sum(param.grad is not None for param in model.parameters())
        scaling.step(optimizer)
        scaling.update()
        outcome["steps"].append((scaling.get_scale(), float(optimizer.last_step.found_inf)))
        optimizer.zero_grad()
    return outcome


def state_in_one_process(rank: int, case: Case) -> list[Any]:
    """The only parameter lies in the first process; the other makes up its state when that is asked for."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    model = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = case.fused(model.parameters())
    norms = []
    for value in (1.0, 2.0):
        model(torch.full((1, 1), value, dtype=torch.float64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.last_step.grad_norm))
        state = get_state_dict(model, optimizer)[1]["state"]
    return [norms, sorted(state)]


def given_norm(rank: int, kind: str, case: Case, form: str) -> dict[str, Any]:
    """The norm that a step clips by comes from its caller."""
    from torch.distributed.tensor import DTensor, Partial

    sharded, twin = shard(kind, case.model()), shard(kind, case.model())
    optimizer, finding = case.fused(sharded.model.parameters()), case.fused(twin.model.parameters())
    outcome: dict[str, Any] = {"reports": []}
    scaled: dict[str, Any] = {} if form == "dtensor" else {"grad_scale": 4.0}
    for batch in batches():
        for each, own in ((sharded, optimizer), (twin, finding)):
            own.zero_grad()
            (loss_of(each.model, each.part(batch)) * scaled.get("grad_scale", 1.0)).backward()
        finding.step(**scaled)
        norm: Any = finding.last_step.grad_norm
        if form == "dtensor":  # that has yet to be added up
            norm = DTensor.from_local(norm * (rank == 1), mesh_of(fsdp=WORLD), [Partial()])
        optimizer.step(grad_norm=float(norm) if form == "number" else norm, **scaled)
        outcome["reports"].append((report_of(optimizer), report_of(finding)))
        grads = [
            (local(one.grad), local(other.grad))
            for one, other in zip(sharded.model.parameters(), twin.model.parameters(), strict=True)
        ]
        for one, other in grads:
            torch.testing.assert_close(one, other, **TOLERANCE)
    before = snapshot(optimizer)
    optimizer.step(grad_scale=4.0, grad_norm=math.inf)
    outcome["skipped"] = report_of(optimizer)
    assert_equal(snapshot(optimizer), before)
    optimizer.step(grad_norm=1.0, found_inf=torch.tensor(float(rank)))
    outcome["found_inf"] = report_of(optimizer)
    assert_equal(snapshot(optimizer), before)
    return {**outcome, "parameters": sharded.parameters(), "expected": twin.parameters()}


def pipeline(rank: int, case: Case, scaler: str | None, at: int | None) -> dict[str, Any]:
    """Each process has a stage of the model, and with it an optimizer."""
    model = case.model()
    stages = [[*model.norm.parameters(), *model.up.parameters()], [*model.down.parameters(), *model.head.parameters()]]
    params = stages[rank]
    member = dataclasses.replace(case, clip=None).fused(params)
    group = fusedopt.ClipGroup([member], torch.distributed.group.WORLD, **(case.clip or {}))
    amp = scaler_of(scaler) if scaler else None
    outcome: dict[str, Any] = {"reports": [], "scales": []}
    for index, batch in enumerate(batches(4)):
        model.zero_grad()
        loss = loss_of(model, batch)
        (amp.scale(loss) if amp else loss).backward()
        if index == at and rank == 1:
            params[0].grad.view(-1)[0] = INF
        before = snapshot(member)
        if amp:
            amp.step(group)
            amp.update()
            outcome["scales"].append(amp.get_scale())
        elif index == at:
            group.step(found_inf=torch.tensor(float(rank)))
        else:
            group.step()
        if index == at:
            assert_equal(snapshot(member), before) if index else assert_equal(snapshot(member)[0], before[0])
        outcome["reports"].append(report_of(group))
        for owner, stage in enumerate(stages):  # in place of the other stage's work
            for param in stage:
                torch.distributed.broadcast(param.detach(), owner)
    names = {id(param): name for name, param in model.named_parameters()}
    return {**outcome, "parameters": {names[id(param)]: param.detach() for param in params}}


def pair(rank: int, kind: str, clip: dict[str, Any] | None, scaler: str | None, backend: str) -> dict[str, Any]:
    """Two optimizers of one sharded model."""
    sharded = shard(kind, Case().model())
    members = pair_of(sharded.model, fusedopt.FusedAdamW, fusedopt.FusedSGD, backend=backend)
    called = []
    for member in members:
        member.register_step_pre_hook(lambda own, *_: called.append(("before", type(own).__name__)))
        member.register_step_post_hook(lambda own, *_: called.append(("after", type(own).__name__)))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(member, 0.5) for member in members]
    group = fusedopt.ClipGroup(members, **(clip or {}))
    amp = scaler_of(scaler) if scaler else None
    reports = []
    for index, batch in enumerate(batches(4)):
        group.zero_grad()
        loss = loss_of(sharded.model, sharded.part(batch))
        (amp.scale(loss) if amp else loss).backward()
        if amp and index == 1:
            plant(sharded, kind, rank == WORLD - 1)
        before = [snapshot(member) for member in members]
        if amp:
            amp.step(group)
            amp.update()
        else:
            group.step()
        if amp and index == 1:
            assert_equal([snapshot(member) for member in members], before)
        for schedule in schedules:
            schedule.step()
        reports.append(report_of(group))
    return {"parameters": sharded.parameters(), "reports": reports, "called": called, "scale": amp and amp.get_scale()}


def pair_of(model: Any, first: Any, second: Any, **settings: Any) -> list[Any]:
    weights = [param for name, param in model.named_parameters() if name.endswith("weight")]
    others = [param for name, param in model.named_parameters() if not name.endswith("weight")]
    return [first(weights, lr=0.05, **settings), second(others, lr=0.05, momentum=0.9, **settings)]


def disagreeing(rank: int, kind: str, what: str) -> dict[str, Any]:
    """The processes' optimizers differ."""
    case = Case(clip=CLIP)
    sharded = shard(kind, case.model())
    params: Any = list(sharded.model.parameters())
    if rank and what == "clip":
        case = Case(clip=dict(max_norm=0.4))
    if rank and what == "no-clip":
        case = Case()
    if rank and what == "class":
        case = Case(optimizer="Adam", clip=CLIP)
    if rank and what == "groups":
        params = [{"params": params[:2]}, {"params": params[2:]}]
    if rank and what == "number":
        params = params[:-1]
    if rank and what == "order":
        params = params[::-1]
    optimizer = optimizer_of(kind, case, sharded) if kind.startswith("zero") else case.fused(params)
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    before = snapshot(optimizer)
    outcome = refused(optimizer.step), refused(optimizer.step)
    assert_equal(snapshot(optimizer), before)
    return {"refused": outcome}


def left_behind(rank: int, kind: str) -> list[str]:
    """The model is sharded after its optimizer was made."""
    gc.collect()  # models of other scenarios
    model = Case().model()
    optimizer = Case(clip=CLIP).fused(model.parameters())
    sharded = shard(kind, model)
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    return [refused(optimizer.step), refused(optimizer.step)]


def made_before(rank: int) -> dict[str, Any]:
    """FSDP1 with use_orig_params keeps the parameters, so the optimizer may be older."""
    case = Case(clip=CLIP)
    model = case.model()
    optimizer = case.fused(model.parameters())
    sharded = shard("fsdp1", model)
    return train(case, sharded, optimizer, batches(), fused=True)


def wrong_parameters(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = mesh_of(fsdp=WORLD)

    def dealt(mesh: Any, *placements: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, placements))

    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    alone = [DeviceMesh("cpu", [0]), DeviceMesh("cpu", [1])]
    good, other = dealt(mesh, Shard(0)), dealt(alone[0], Shard(0))
    outcome = {"partial": refused(lambda: fusedopt.FusedAdamW([("w", good), ("partial", partial)]))}
    outcome["outside"] = refused(fusedopt.FusedAdamW([("w", other)]).step) if rank == 1 else ""
    optimizer = fusedopt.FusedAdamW([("w", good)])
    good.grad, before = torch.ones_like(good), good.to_local().clone()
    good.grad = DTensor.from_local(torch.ones(4)[:3], mesh, [Shard(0)], shape=(4,), stride=(1,), run_check=False)
    outcome["shape"] = refused(optimizer.step)
    good.grad = None
    good.grad = torch.ones_like(good)
    optimizer.step()
    assert not torch.equal(good.to_local(), before)
    return outcome


def in_backward(rank: int) -> str:
    sharded = shard("fsdp", Case().model())
    optimizer = Case(clip=CLIP).fused(sharded.model.parameters())
    messages = []
    bias = sharded.model.head.bias
    bias.register_post_accumulate_grad_hook(lambda _: messages.append(refused(optimizer.step)))
    bias.register_hook(lambda grad: messages.append(refused(optimizer.step)))
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    return messages[0]


def fused_later(rank: int, case: Case) -> Result:
    """torch's optimizer over DTensors, whose twin goes on."""
    sharded = shard("fsdp", case.model())
    optimizer: Any = case.stock(sharded.model.parameters())
    data = batches(4)
    plain = dataclasses.replace(case, clip=None)
    train(plain, sharded, optimizer, data[:2], fused=False)
    twin = fusedopt.fuse(optimizer)
    return train(plain, sharded, twin, data[2:], fused=True)


def copied(rank: int, case: Case, how: str) -> dict[str, Any]:
    """Another optimizer of an equal model takes over the state."""
    sharded, again = shard("fsdp", case.model()), shard("fsdp", case.model())
    optimizer = case.fused(sharded.model.parameters())
    train(case, sharded, optimizer, batches(2), fused=True)
    with torch.no_grad():
        for one, other in zip(again.model.parameters(), sharded.model.parameters(), strict=True):
            one.copy_(other)
    resumed = case.fused(again.model.parameters())
    saved = optimizer.state_dict()
    if how == "file":
        stream = io.BytesIO()
        torch.save(saved, stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=False)
    if how == "whole":
        entries = saved["state"].items()
        saved["state"] = {key: {name: full(value) for name, value in entry.items()} for key, entry in entries}
    resumed.load_state_dict(saved)
    one = train(case, sharded, optimizer, batches(4)[2:], fused=True)
    other = train(case, again, resumed, batches(4)[2:], fused=True)
    return {"one": [one.parameters, one.state], "other": [other.parameters, other.state]}


def duplicated(rank: int, case: Case) -> dict[str, Any]:
    """Copies of an optimizer, as far as torch can copy a DTensor."""
    sharded = shard("tp", case.model())
    optimizer = case.fused(sharded.model.parameters())
    train(case, sharded, optimizer, batches(2), fused=True)
    several = [optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for index in range(2):
        for each in several:
            for param in (param for group in each.param_groups for param in group["params"]):
                param.grad = torch.sin(param.detach() * 9 + index)
            each.step()
    return {"reports": [report_of(each) for each in several], "kept": [snapshot(each) for each in several]}


def saved_by_one(rank: int) -> list[Any]:
    """Only one process asks for the state dict, after a step that was skipped."""
    sharded = shard("fsdp", Case().model())
    optimizer = Case().fused(sharded.model.parameters())
    optimizer.zero_grad()
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    plant(sharded, "fsdp", rank == WORLD - 1)
    optimizer.step(grad_scale=1.0)
    keys = list(optimizer.state_dict()["state"]) if rank == 0 else []
    torch.distributed.barrier()
    return keys


def changed_later(rank: int) -> Result:
    """clip_grad and groups change between steps."""
    case = Case(settings=dict(lr=0.05, weight_decay=0.1))
    sharded = shard("fsdp", case.model())
    params = list(sharded.model.parameters())
    optimizer = case.fused(params[:-2])
    data = batches(3)
    train(case, sharded, optimizer, data[:1], fused=True)
    optimizer.clip_grad = CLIP
    train(case, sharded, optimizer, data[1:2], fused=True)
    optimizer.add_param_group({"params": params[-2:], "lr": 0.01})
    sharded.model.zero_grad()
    return train(case, sharded, optimizer, data[2:], fused=True)


def part_of(rank: int, kind: str, names: tuple[str, ...], case: Case) -> dict[str, Any]:
    """An optimizer of some parameters, whose gradients may have nothing to add up or have yet to be added up."""
    sharded = shard(kind, case.model())
    optimizer, reports = case.fused([sharded.model.get_parameter(name) for name in names]), []
    for batch in batches():
        sharded.model.zero_grad()
        loss_of(sharded.model, sharded.part(batch)).backward()
        optimizer.step()
        reports.append(report_of(optimizer))
    return {"parameters": sharded.parameters(), "reports": reports}


def ignored(rank: int, flat: bool) -> Result:
    """FSDP1 leaves some parameters alone, and their gradients to its user."""
    case = Case(clip=CLIP)
    model = case.model()
    sharded = shard("fsdp1-flat" if flat else "fsdp1", model, ignored_states=[*model.norm.parameters()])
    optimizer = case.fused(sharded.model.parameters())

    def average(*_: Any) -> None:
        for param in model.norm.parameters():
            torch.distributed.all_reduce(param.grad.div_(WORLD))

    optimizer.register_step_pre_hook(average)
    return train(case, sharded, optimizer, batches(), fused=True)


def handed_in(rank: int, kind: str, case: Case) -> dict[str, Any]:
    """One process is given found_inf."""
    sharded = shard(kind, case.model())
    optimizer = case.fused(sharded.model.parameters())
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    optimizer.step(found_inf=torch.tensor(0.0))
    before, reports = snapshot(optimizer), [report_of(optimizer)]
    for value in (torch.tensor(float(rank)), torch.tensor([float(rank)])):
        optimizer.step(found_inf=value, grad_scale=torch.tensor(2.0))
        assert_equal(snapshot(optimizer), before)
        reports.append(report_of(optimizer))
    return {"reports": reports}


def same_clip(rank: int) -> list[Any]:
    """As a number here and as a tensor there, as tensors differ that lie on other devices."""
    case = Case(clip=dict(max_norm=torch.tensor(0.25) if rank else 0.25))
    sharded = shard("fsdp", case.model())
    optimizer = case.fused(sharded.model.parameters())
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    optimizer.step()
    return report_of(optimizer)


def disagreeing_group(rank: int) -> str:
    param = torch.nn.Parameter(torch.ones(4))
    member = fusedopt.FusedSGD([param], lr=0.1)
    group = fusedopt.ClipGroup([member], torch.distributed.group.WORLD, max_norm=1.0 + rank)
    param.grad = torch.ones(4)
    message = refused(group.step)
    assert param.tolist() == [1.0] * 4
    return message


def sharded_beside_plain(rank: int) -> dict[str, Any]:
    """One member of a ClipGroup is sharded, the other is not."""
    from torch.distributed.fsdp import fully_shard

    model = Case().model()
    fully_shard(model.up, mesh=mesh_of(fsdp=WORLD))
    plain = [param for name, param in model.named_parameters() if not name.startswith("up")]
    members = [fusedopt.FusedAdamW(plain, lr=0.05), fusedopt.FusedAdamW(model.up.parameters(), lr=0.05)]
    group, reports = fusedopt.ClipGroup(members, **CLIP), []
    for batch in batches():
        group.zero_grad()
        loss_of(model, batch.chunk(WORLD)[rank]).backward()
        for param in plain:
            torch.distributed.all_reduce(param.grad.div_(WORLD))
        group.step()
        reports.append(report_of(group))
    return {"parameters": {name: full(param) for name, param in model.named_parameters()}, "reports": reports}


def flat_state(rank: int, flat: bool, case: Case) -> dict[str, Any]:
    """FSDP1's own functions for the state of an optimizer."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp import StateDictType

    kind = "fsdp1-flat" if flat else "fsdp1"
    sharded, again = shard(kind, case.model()), shard(kind, case.model())
    optimizer = case.fused(sharded.model.parameters())
    train(case, sharded, optimizer, batches(2), fused=True)
    with Fsdp.state_dict_type(sharded.model, StateDictType.FULL_STATE_DICT):
        weights, whole = sharded.model.state_dict(), Fsdp.optim_state_dict(sharded.model, optimizer)
    resumed = case.fused(again.model.parameters())
    with Fsdp.state_dict_type(again.model, StateDictType.FULL_STATE_DICT):
        again.model.load_state_dict(weights)
        resumed.load_state_dict(Fsdp.optim_state_dict_to_load(again.model, resumed, whole))
    one = train(case, sharded, optimizer, batches(4)[2:], fused=True)
    other = train(case, again, resumed, batches(4)[2:], fused=True)
    assert_equal([other.parameters, other.reports], [one.parameters, one.reports])
    return {"whole": whole["state"]}


PARTS = {
    f"part-{kind}-{what}-{name}": (part_of, (kind, names, TRAINED[name]))
    for kind, what, names in (
        ("tp", "replicated", ("norm.weight", "norm.bias")),
        ("tp", "plain", ("head.weight", "head.bias")),
        ("tp", "dealt-out", ("up.weight", "down.weight")),
    )
    for name in ("clipped", "norm-1", "reference", "emulated")
    if name in TRAINED
}
HANDED_IN = {
    f"handed-in-{kind}-{name}": (handed_in, (kind, TRAINED[name]))
    for kind in ("fsdp", "tp", "fsdp1")
    for name in ("clipped", "unclipped", "reference", "value", "emulated")
    if name in TRAINED
}
# (With use_orig_params, torch 2.13 mixes up the two moments of stock optimizers, too.)
FLAT_STATES = {
    f"flat-state-{flat}-{name}": (flat_state, (flat, TRAINED[name]))
    for flat, name in ((True, "clipped"), (True, "plain-momentum"), (False, "plain-momentum"))
}
SCENARIOS |= {**PARTS, **HANDED_IN, **FLAT_STATES}
SCENARIOS |= {f"ignored-{flat}": (ignored, (flat,)) for flat in (False, True)}
UNEQUAL = {
    f"unequal-{name}": (unequal, ("tp", TRAINED[name]))
    for name in ("unclipped", "reference-norm-inf", "emulated-norm-1", "emulated-pair-norm-inf")
    if name in TRAINED
}
SCENARIOS |= UNEQUAL
SCENARIOS |= {"same-clip": (same_clip, ()), "disagreeing-group": (disagreeing_group, ())}
SCENARIOS |= {"sharded-beside-plain": (sharded_beside_plain, ())}
SCENARIOS |= {"mixed": (mixed, (None,)), "mixed-clipped": (mixed, (CLIP,))}
NONFINITE = {
    f"nonfinite-{kind}-{name}": (nonfinite, (kind, TRAINED[name]))
    for kind in ("fsdp", "tp", "fsdp1", "zero", "zero-torch")
    for name in (
        "clipped",
        "norm-1",
        "norm-inf",
        "reference",
        "reference-norm-inf",
        "emulated",
        "emulated-pair-norm-inf",
    )
    if name in TRAINED and not (kind == "fsdp1" and "reference" in name)
}
SCENARIOS |= NONFINITE
ALONE = {
    f"alone-{kind}-{name}-{scaler}": (alone_in_a_process, (kind, TRAINED[name], scaler))
    for kind in ("fsdp", "fsdp1")
    for name in ("clipped", "norm-inf", "reference", "unclipped", "emulated")
    for scaler in (None, "ours")
    if name in TRAINED
}
SCENARIOS |= ALONE
NO_GRADIENTS = {
    f"no-gradients-{name}-{scaled}": (no_gradients, (TRAINED[name], scaled))
    for name in ("clipped", "norm-inf", "reference", "unclipped", "emulated")
    for scaled in (False, True)
    if name in TRAINED
}
SCENARIOS |= NO_GRADIENTS
STATE_IN_ONE = {
    f"state-in-one-{name}": (state_in_one_process, (TRAINED[name],)) for name in ("clipped", "plain-sgd", "reference")
}
SCENARIOS |= STATE_IN_ONE
NOTHING = {f"nothing-{scaler}": (nothing_in_a_process, (scaler,)) for scaler in ("ours", "stock", "sharded")}
SCENARIOS |= NOTHING
GIVEN = {
    f"given-{kind}-{name}-{form}": (given_norm, (kind, TRAINED[name], form))
    for kind, name, form in (
        ("fsdp", "written-back", "dtensor"),
        ("fsdp", "norm-3", "tensor"),
        ("fsdp", "norm-inf", "number"),
        ("fsdp", "reference", "dtensor"),
        ("fsdp", "emulated", "dtensor"),
        ("tp", "clipped", "tensor"),
    )
    if name in TRAINED
}
SCENARIOS |= GIVEN
PIPELINES = {
    f"pipeline-{name}-{scaler}-{at}": (pipeline, (TRAINED[name], scaler, at))
    for name, scaler, at in (
        ("clipped", None, None),
        ("norm-1", None, None),
        ("norm-inf", None, None),
        ("reference", None, None),
        ("emulated", None, None),
        ("only-report", None, None),
        ("unclipped", None, 2),
        ("clipped", None, 0),
        ("clipped", "ours", 0),
        ("norm-inf", "ours", 2),
        ("unclipped", "ours", 2),
        ("clipped", "stock", 0),
        ("unclipped", "stock", 2),
        ("reference", "stock", 2),
    )
    if name in TRAINED
}
SCENARIOS |= PIPELINES
PAIRS = {
    f"pair-{kind}-{'clipped' if clip else 'unclipped'}-{scaler}-{backend}": (pair, (kind, clip, scaler, backend))
    for kind in ("fsdp", "tp")
    for clip in (None, CLIP, dict(max_norm=0.05, norm_type=math.inf))
    for scaler in (None, "ours", "stock")
    for backend in ("auto", "reference", *(["emulated-pair"] if HAS_EMULATOR else []))
    if not (kind == "tp" and scaler == "stock")
}
SCENARIOS |= PAIRS
DISAGREEMENTS = {
    f"disagreeing-{kind}-{what}": (disagreeing, (kind, what))
    for kind in ("fsdp", "tp", "fsdp1")
    for what in ("clip", "no-clip", "class", "groups", "number", "order")
    if not (kind == "fsdp1" and what == "order")
}
DISAGREEMENTS |= {f"disagreeing-zero-{what}": (disagreeing, ("zero", what)) for what in ("clip", "no-clip")}
SCENARIOS |= DISAGREEMENTS
SCENARIOS |= {f"left-behind-{kind}": (left_behind, (kind,)) for kind in ("fsdp", "tp", "fsdp1-flat")}
SCENARIOS |= {"made-before-fsdp1": (made_before, ())}
SCENARIOS |= {"wrong-parameters": (wrong_parameters, ()), "in-backward": (in_backward, ())}
LATER = {
    f"fused-later-{name}": (fused_later, (TRAINED[name],)) for name in ("unclipped", "plain-momentum", "plain-sgd")
}
SCENARIOS |= LATER
COPIES = {
    f"copied-{how}-{name}": (copied, (TRAINED[name], how))
    for how in ("dict", "file", "whole")
    for name in ("clipped", "plain-momentum", "norm-3", "reference")
}
SCENARIOS |= COPIES
DUPLICATED = {f"duplicated-{name}": (duplicated, (TRAINED[name],)) for name in ("clipped", "norm-1", "reference")}
SCENARIOS |= DUPLICATED
SCENARIOS |= {"saved-by-one": (saved_by_one, ()), "changed-later": (changed_later, ())}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes_of(SCENARIOS, WORLD, request, tmp_path_factory)


@each_of(TRAININGS)
def test_trains_as_one_process_with_the_whole_batch(outcomes: Outcomes, scenario: str) -> None:
    case: Case = SCENARIOS[scenario][1][1]
    results, expected = outcomes[scenario], alone(case)
    tolerance = {} if case.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    assert_reports(results, case, expected, **tolerance)
    for result in results:
        assert_close(result.parameters, expected.parameters, **tolerance)
        if result.state:
            assert_close(result.state, expected.state, **tolerance)
        if case.write_back and result.state:
            assert_close(dict(enumerate(result.grads)), dict(enumerate(expected.grads)), **tolerance)
        assert result.rest == (3 if case.hooks else 0)


@each_of(OVERFLOWS)
def test_an_overflow_in_one_process_skips_the_step_in_all(outcomes: Outcomes, scenario: str) -> None:
    sharding, case, scaler, at, by_hand = OVERFLOWS[scenario][1]
    # Of these wrappers, torch's scalers keep the optimizer from stepping by themselves.
    skips_itself = sharding == "zero-torch" or (sharding == "zero" and (scaler != "ours" or by_hand))
    assert_skipped(outcomes[scenario], case, at, reported=not skips_itself)


@pytest.mark.parametrize("scenario", ["mixed", "mixed-clipped"])
def test_bfloat16_trains_as_torchs_clipping_and_optimizer(outcomes: Outcomes, scenario: str) -> None:
    results = outcomes[scenario]
    case = Case(clip=SCENARIOS[scenario][1][0])
    assert_reports([result["fused"] for result in results], case, results[0]["stock"], rtol=1e-5)
    for result in results:
        assert_close(result["fused"].parameters, result["stock"].parameters, rtol=1e-5, atol=1e-6)
        assert_close(result["fused"].state, result["stock"].state, rtol=1e-4, atol=1e-6)


@each_of(NONFINITE)
def test_a_norm_that_is_not_finite_is_an_error_in_all_processes(outcomes: Outcomes, scenario: str) -> None:
    expected = alone(NONFINITE[scenario][1][1], batches(2))
    for outcome in outcomes[scenario]:
        for message in outcome["refused"]:
            assert "RuntimeError: The total norm" in message
            assert "is nan, so it cannot be clipped" in message
        assert_close(outcome["parameters"], expected.parameters)


@each_of(ALONE)
def test_parameters_of_which_one_process_has_nothing(outcomes: Outcomes, scenario: str) -> None:
    kind, case, scaler = ALONE[scenario][1]
    model = case.model()
    params = [model.norm.weight] if kind == "fsdp1" else [model.head.weight, model.head.bias]
    optimizer, norms = case.stock(params), []
    for batch in batches():
        model.zero_grad()
        loss_of(model, batch).backward()
        norms.append(stock_clip(params, case.clip))
        optimizer.step()
    first, second = outcomes[scenario]
    assert second["elements"] == 0 < first["elements"]
    assert repr(first["reports"]) == repr(second["reports"])
    for (norm, _, found_inf), want in zip(first["reports"], norms, strict=True):
        assert norm == (None if want is None else pytest.approx(float(want), rel=1e-12))
        assert found_inf == (0.0 if scaler else None)
    for outcome in (first, second):
        assert_close(outcome["parameters"], dict(model.named_parameters()))


@each_of(NO_GRADIENTS)
def test_a_process_without_gradients_takes_part_in_the_report(outcomes: Outcomes, scenario: str) -> None:
    case, scaled = NO_GRADIENTS[scenario][1]
    (first, _), (second, kept) = outcomes[scenario]
    assert repr(first) == repr(second)
    assert (first[0] is None) == (case.clip is None)
    assert first[2] == (0.0 if scaled else None)
    model = case.model()
    for param, part in zip(model.parameters(), kept, strict=True):
        assert not part.numel() or torch.equal(part, param.detach().chunk(2)[1])


@each_of(NOTHING)
def test_a_scaler_hears_of_the_others_where_it_has_no_gradient(outcomes: Outcomes, scenario: str) -> None:
    first, second = outcomes[scenario]
    assert [first["gradients"], second["gradients"]] == [1, 0]
    assert first["steps"] == second["steps"] == [(8.0, 0.0), (4.0, 1.0), (4.0, 0.0)]


@each_of(STATE_IN_ONE)
def test_a_process_makes_up_state_by_itself(outcomes: Outcomes, scenario: str) -> None:
    first, second = outcomes[scenario]
    assert first[0] == second[0] == [1.0, 2.0]
    assert first[1] == second[1]


@each_of(GIVEN)
def test_a_norm_that_is_given_clips_as_one_that_is_found(outcomes: Outcomes, scenario: str) -> None:
    for outcome in outcomes[scenario]:
        assert_close(outcome["parameters"], outcome["expected"])
        for given, found in outcome["reports"]:
            assert given[:2] == pytest.approx(found[:2], rel=1e-12)
            assert given[2] == found[2]
        assert outcome["skipped"] == (INF, 0.0, 1.0)
        assert outcome["found_inf"][2] == 1.0


@each_of(PIPELINES)
def test_stages_of_a_pipeline_clip_and_skip_together(outcomes: Outcomes, scenario: str) -> None:
    case, scaler, at = PIPELINES[scenario][1]
    first, second = outcomes[scenario]
    expected = alone(case, [batch for index, batch in enumerate(batches(4)) if index != at])
    assert_close({**first["parameters"], **second["parameters"]}, expected.parameters)
    assert repr(first["reports"]) == repr(second["reports"])
    assert first["scales"] == second["scales"]
    if scaler:
        assert first["scales"] == {0: [4.0, 4.0, 8.0, 8.0], 2: [8.0, 16.0, 8.0, 8.0]}[at]
    kept = [norm for index, (norm, *_) in enumerate(first["reports"]) if index != at]
    assert kept == [None if want is None else pytest.approx(want, rel=1e-12) for want in expected.reports]
    for index, (*_, found_inf) in enumerate(first["reports"]):
        assert found_inf == (float(index == at) if scaler or index == at else None)


@each_of(PAIRS)
def test_two_optimizers_of_a_sharded_model_clip_and_skip_together(outcomes: Outcomes, scenario: str) -> None:
    _, clip, scaler, _ = PAIRS[scenario][1]
    model = Case().model()
    members = pair_of(model, torch.optim.AdamW, torch.optim.SGD, foreach=False)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(member, 0.5) for member in members]
    norms = []
    for index, batch in enumerate(batches(4)):
        model.zero_grad()
        loss_of(model, batch).backward()
        norms.append(None if scaler and index == 1 else stock_clip(list(model.parameters()), clip))
        for member in members if not (scaler and index == 1) else ():
            member.step()
        for schedule in schedules:
            warnings_ignored(schedule.step)
    first, second = outcomes[scenario]
    assert repr(first["reports"]) == repr(second["reports"])
    for (norm, *_), want in zip(first["reports"], norms, strict=True):
        assert want is None or norm == pytest.approx(float(want), rel=1e-12)
    for outcome in (first, second):
        assert_close(outcome["parameters"], dict(model.named_parameters()))
        once = [("before", "FusedAdamW"), ("before", "FusedSGD"), ("after", "FusedAdamW"), ("after", "FusedSGD")]
        assert outcome["called"] == once * 4
        assert outcome["scale"] == (8.0 if scaler else None)


def warnings_ignored(step: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()


@each_of(DISAGREEMENTS)
def test_processes_that_disagree_are_told_before_the_first_step(outcomes: Outcomes, scenario: str) -> None:
    what = DISAGREEMENTS[scenario][1][1]
    named = {"groups": "number of parameter groups", "order": "param_groups[0]['params'][0]", "class": "class"}
    for outcome in outcomes[scenario]:
        for message in outcome["refused"]:
            assert message.startswith("ValueError: the optimizers of processes 0 and 1 differ in ")
            assert named.get(what, "number of parameters in" if what == "number" else "clip_grad") in message


@pytest.mark.parametrize("kind", ["fsdp", "tp", "fsdp1-flat"])
def test_an_optimizer_made_before_its_model_was_sharded_is_refused(outcomes: Outcomes, kind: str) -> None:
    for messages in outcomes[f"left-behind-{kind}"]:
        for message in messages:
            assert message.startswith("RuntimeError: parameter")
            assert "after this optimizer was made" in message


def test_an_optimizer_may_be_older_than_fsdp1_that_keeps_its_parameters(outcomes: Outcomes) -> None:
    expected = alone(Case(clip=CLIP))
    for result in outcomes["made-before-fsdp1"]:
        assert_close(result.parameters, expected.parameters)


def test_parameters_and_gradients_that_cannot_be_used_are_named(outcomes: Outcomes) -> None:
    for outcome in outcomes["wrong-parameters"]:
        assert re.match(r"TypeError: parameter 'partial'.*expected Shard or Replicate", outcome["partial"])
        assert re.match(r"RuntimeError: .*'w'", outcome["shape"]), outcome["shape"]
    assert re.match(
        r"ValueError: .*'w'.*a mesh of the processes \[0\], to which this one does not belong",
        outcomes["wrong-parameters"][1]["outside"],
    )


def test_clipping_in_a_backward_pass_is_refused(outcomes: Outcomes) -> None:
    for message in outcomes["in-backward"]:
        assert message.startswith("RuntimeError: a step with clip_grad max_norm inside a backward pass")


@each_of(LATER)
def test_a_twin_goes_on_over_dtensors(outcomes: Outcomes, scenario: str) -> None:
    expected = alone(dataclasses.replace(LATER[scenario][1][0], clip=None), batches(4))
    for result in outcomes[scenario]:
        assert_close(result.parameters, expected.parameters)
        assert_close(result.state, expected.state)


@each_of(COPIES)
def test_state_goes_to_another_optimizer(outcomes: Outcomes, scenario: str) -> None:
    for outcome in outcomes[scenario]:
        assert_equal(outcome["one"], outcome["other"])


@each_of(DUPLICATED)
def test_a_copy_of_an_optimizer_steps_with_the_other_processes(outcomes: Outcomes, scenario: str) -> None:
    for outcome in outcomes[scenario]:
        for reports, kept in zip(outcome["reports"], outcome["kept"], strict=True):
            assert reports == outcome["reports"][0]
            assert_equal(kept, outcome["kept"][0])


def test_one_process_may_ask_for_the_state(outcomes: Outcomes) -> None:
    assert outcomes["saved-by-one"] == [[], []]


def test_settings_and_groups_change_between_steps(outcomes: Outcomes) -> None:
    model = Case().model()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params[:-2], lr=0.05, weight_decay=0.1, foreach=False)
    for index, batch in enumerate(batches(3)):
        if index == 2:
            optimizer.add_param_group({"params": params[-2:], "lr": 0.01})
        model.zero_grad()
        loss_of(model, batch).backward()
        norm = stock_clip(params if index == 2 else params[:-2], CLIP) if index else None
        optimizer.step()
    for result in outcomes["changed-later"]:
        assert result.reports[0][0] == pytest.approx(float(norm), rel=1e-12)
        assert_close(result.parameters, dict(model.named_parameters()))


@each_of(UNEQUAL)
def test_an_overflow_skips_all_whatever_it_is_in(outcomes: Outcomes, scenario: str) -> None:
    assert [found_inf for *_, found_inf in outcomes[scenario]] == [1.0] * WORLD


@each_of(PARTS)
def test_an_optimizer_of_some_parameters(outcomes: Outcomes, scenario: str) -> None:
    _, names, case = PARTS[scenario][1]
    model = case.model()
    params = [model.get_parameter(name) for name in names]
    optimizer, norms = case.stock(params), []
    for batch in batches():
        model.zero_grad()
        loss_of(model, batch).backward()
        norms.append(float(stock_clip(params, case.clip)))
        optimizer.step()
    for outcome in outcomes[scenario]:
        assert [norm for norm, *_ in outcome["reports"]] == pytest.approx(norms, rel=1e-12)
        assert_close(outcome["parameters"], dict(model.named_parameters()))


@pytest.mark.parametrize("flat", [False, True])
def test_parameters_that_fsdp1_ignores(outcomes: Outcomes, flat: bool) -> None:
    case = Case(clip=CLIP)
    results, expected = outcomes[f"ignored-{flat}"], alone(case)
    assert_reports(results, case, expected)
    for result in results:
        assert_close(result.parameters, expected.parameters)


@each_of(HANDED_IN)
def test_found_inf_that_one_process_is_given_skips_all(outcomes: Outcomes, scenario: str) -> None:
    first, second = outcomes[scenario]
    assert repr(first) == repr(second)
    assert [found_inf for *_, found_inf in first["reports"]] == [0.0, 1.0, 1.0]


def test_a_bound_may_be_a_number_or_a_tensor(outcomes: Outcomes) -> None:
    first, second = outcomes["same-clip"]
    assert first == second


def test_groups_of_optimizers_that_disagree_are_told(outcomes: Outcomes) -> None:
    for message in outcomes["disagreeing-group"]:
        assert message.startswith("ValueError: the optimizers of processes 0 and 1 differ in clip_grad")
        assert "max_norm=1.0" in message
        assert "max_norm=2.0" in message


def test_a_group_of_a_sharded_and_a_plain_optimizer(outcomes: Outcomes) -> None:
    case = Case(settings=dict(lr=0.05), clip=CLIP)
    expected = alone(case)
    for outcome in outcomes["sharded-beside-plain"]:
        assert [norm for norm, *_ in outcome["reports"]] == pytest.approx(expected.reports, rel=1e-12)
        assert_close(outcome["parameters"], expected.parameters)


@each_of(FLAT_STATES)
def test_fsdp1s_functions_save_and_load_the_state(outcomes: Outcomes, scenario: str) -> None:
    case = FLAT_STATES[scenario][1][1]
    expected = alone(case, batches(2)).state
    whole = outcomes[scenario][0]["whole"]
    assert_close(whole, expected)
