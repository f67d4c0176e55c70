"""Four processes: meshes of two dimensions, pipelines of sharded stages, and checkpoints for other numbers of them."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import HAS_EMULATOR, INF
from sharded_cases import (
    MARKS,
    Case,
    Outcomes,
    alone,
    assert_close,
    assert_equal,
    assert_reports,
    assert_skipped,
    batches,
    each_of,
    full,
    has_last,
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
    state_of,
    train,
    trained,
    unequal,
)
from torch import nn

import fusedopt

pytestmark = MARKS
WORLD = 4

CLIP = dict(max_norm=0.3)
SGD = dict(optimizer="SGD", settings=dict(lr=0.05, momentum=0.9, weight_decay=0.1))

CASES: dict[str, Case] = {
    "unclipped": Case(),
    "clipped": Case(clip=CLIP),
    "norm-1": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1)),
    "norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf")),
    "value": Case(clip=dict(type="value", clip_value=0.02)),
    "momentum": Case(**SGD),
    "frozen": Case(clip=CLIP, frozen=("up.weight", "down.bias")),
    "unused": Case(clip=CLIP, unused=True),
    "accumulated": Case(clip=CLIP, accumulate=2),
    "written-back": Case(**SGD, clip=CLIP, write_back=True),
    "reference": Case(clip=CLIP, backend="reference", write_back=True),
    "reference-norm-inf": Case(**SGD, clip=dict(max_norm=0.05, norm_type="inf"), backend="reference"),
}
if HAS_EMULATOR:
    CASES |= {
        "emulated": Case(**SGD, clip=dict(max_norm=0.5, norm_type=1), backend="emulated"),
        "emulated-pair": Case(clip=CLIP, backend="emulated-pair", write_back=True),
    }
SHARDINGS = {
    "fsdp": ["clipped", "norm-1", "norm-inf", "emulated-pair", "reference"],
    "hsdp": [*(name for name in CASES if name not in ("momentum", "written-back"))],
    "tp-fsdp": [*(name for name in CASES if name not in ("momentum", "unused", "accumulated"))],
    "fsdp1-hybrid": ["clipped", "norm-inf", "reference"],
}
TRAININGS = {
    f"{sharding}-{name}": (trained, (sharding, CASES[name]))
    for sharding, names in SHARDINGS.items()
    for name in names
    if name in CASES
}
OVERFLOWS = {
    f"overflow-{sharding}-{scaler}-{name}-{at}{'-by-hand' if by_hand else ''}": (
        overflowed,
        (sharding, CASES[name], scaler, at, by_hand),
    )
    for sharding in ("hsdp", "tp-fsdp", "fsdp1-hybrid")
    for scaler in ("ours", "stock", "sharded")
    for name, at, by_hand in (
        ("clipped", 0, False),
        ("momentum", 2, False),
        ("reference", 0, False),
        ("norm-inf", 2, True),
    )
    if not (sharding == "fsdp1-hybrid" and name == "reference")
}
SCENARIOS: dict[str, Any] = {**TRAININGS, **OVERFLOWS}


# What runs in all processes -------------------------------------------------------------------------------------------


def nonfinite(rank: int, kind: str, case: Case) -> dict[str, Any]:
    """One element in one process is not a number."""
    case = dataclasses.replace(case, clip={**case.clip, "error_if_nonfinite": True})
    sharded = shard(kind, case.model())
    optimizer = optimizer_of(kind, case, sharded)
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    before = snapshot(optimizer)
    plant(sharded, kind, has_last(kind), float("nan"))
    outcome = {"refused": refused(optimizer.step)}
    assert_equal(snapshot(optimizer)[0], before[0])
    return outcome


def disagreeing(rank: int, kind: str) -> dict[str, str]:
    """One process would clip to something else."""
    sharded = shard(kind, Case().model())
    optimizer = Case(clip=dict(max_norm=0.4 if rank == 2 else 0.3)).fused(sharded.model.parameters())
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    return {"refused": refused(optimizer.step)}


def pipeline(rank: int, case: Case, scaler: str | None, at: int | None) -> dict[str, Any]:
    """Two stages, each of which is sharded over two processes."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(stage=2, fsdp=2)
    stage, part = rank // 2, rank % 2
    model = case.model()
    layers = [[model.norm, model.up], [model.down, model.head]]
    for layer in (layer for each in layers for layer in each):
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    params = [param for layer in layers[stage] for param in layer.parameters()]
    member = dataclasses.replace(case, clip=None).fused(params)
    group = fusedopt.ClipGroup([member], mesh["stage"].get_group(), **(case.clip or {}))
    amp = scaler_of(scaler) if scaler else None
    outcome: dict[str, Any] = {"reports": [], "scales": []}
    for index, batch in enumerate(batches(4)):
        model.zero_grad()
        loss = loss_of(model, batch.chunk(2)[part])
        (amp.scale(loss) if amp else loss).backward()
        if index == at and rank == 1:
            local(params[0].grad).view(-1)[0] = INF
        before = snapshot(member)
        if amp:
            amp.step(group)
            amp.update()
            outcome["scales"].append(amp.get_scale())
        else:
            group.step()
        if index == at:
            assert_equal(snapshot(member)[0], before[0])
        outcome["reports"].append(report_of(group))
        for owner, each in enumerate(layers):  # in place of the other stage's work
            for param in (param for layer in each for param in layer.parameters()):
                dist.broadcast(local(param.detach()), 2 * owner + part, group=mesh["stage"].get_group())
    return {**outcome, "parameters": {name: full(param) for name, param in model.named_parameters()}}


def unrelated_meshes(rank: int) -> dict[str, str]:
    """Parameters over meshes of which not every process knows both."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    meshes = [DeviceMesh("cpu", [0, 1, 2, 3]), *[DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]]
    mine = meshes[1 + rank // 2]
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)])) for mesh in (meshes[0], mine)]
    named = [("wide", params[0]), ("narrow", params[1])]
    outcome = {"made": refused(lambda: fusedopt.FusedAdamW(named, clip_grad=CLIP))}
    optimizer = fusedopt.FusedAdamW(named, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert local(params[0].detach()).ne(1).all()

    def assign() -> None:
        optimizer.clip_grad = CLIP

    outcome["assigned"] = refused(assign)
    outcome["added"] = refused(
        lambda: fusedopt.FusedAdamW([params[0]], clip_grad=CLIP).add_param_group({"params": params[1:]})
    )
    outcome["scaled"] = refused(lambda: optimizer.step(grad_scale=2.0))
    one_each = [fusedopt.FusedSGD([entry], lr=0.1) for entry in named]
    outcome["grouped"] = refused(lambda: fusedopt.ClipGroup(one_each, **CLIP))
    group = fusedopt.ClipGroup(one_each)

    def assign_to_group() -> None:
        group.clip_grad = CLIP

    outcome["assigned-to-group"] = refused(assign_to_group)
    outcome["group-scaled"] = refused(lambda: group.step(grad_scale=2.0))
    return outcome


def swapped(rank: int) -> list[float]:
    """A parameter that is dealt out in another way from one step to the next, with as much of it here as before."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = mesh_of(rep=2, sh=2)

    def dealt_out(*placements: Any) -> nn.Parameter:
        param = nn.Parameter(DTensor.from_local(torch.ones(2, dtype=torch.float64), mesh, placements))
        param.grad = DTensor.from_local(torch.ones(2, dtype=torch.float64), mesh, placements)
        return param

    param = dealt_out(Replicate(), Shard(0))
    optimizer = fusedopt.FusedSGD([param], lr=0.1, clip_grad=CLIP)
    norms = []
    for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Replicate())):
        torch.utils.swap_tensors(param, dealt_out(*placements))
        optimizer.step()
        norms.append(float(optimizer.last_step.grad_norm) ** 2)
    return norms


def stepped_alike(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Models and optimizers after a step with gradients that follow from the parameters."""
    found = []
    for model, optimizer in pairs:
        for param in model.parameters():
            param.grad = torch.sin(param.detach() * 9)
        optimizer.step()
        state = state_of(optimizer, model.named_parameters())
        found.append({"parameters": {name: full(param) for name, param in model.named_parameters()}, "state": state})
    return found


def checkpoint(rank: int, kind: str, name: str, flat: bool) -> dict[str, Any]:
    """Saved by four processes, loaded by two, and by one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    case, options = CASES[name], StateDictOptions(flatten_optimizer_state_dict=flat)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)

    def states(model: Any, optimizer: Any) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(model, options=options),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        }

    def load(model: Any, optimizer: Any, **how: Any) -> tuple[Any, Any]:
        wanted = states(model, optimizer)
        dcp.load(wanted, checkpoint_id=folder[0], **how)
        set_model_state_dict(model, wanted["model"], options=options)
        set_optimizer_state_dict(model, optimizer, wanted["optim"], options=options)
        return model, optimizer

    sharded = shard(kind, case.model())
    optimizer = case.fused(sharded.model.parameters())
    train(case, sharded, optimizer, batches(2), fused=True)
    dcp.save(states(sharded.model, optimizer), checkpoint_id=folder[0])
    saved = state_of(optimizer, sharded.model.named_parameters())

    mesh, group = DeviceMesh("cpu", [0, 1]), dist.new_group([0, 1])
    loaded = {}
    if rank < 2:
        model = case.model()
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
        two = load(model, case.fused(model.parameters()), process_group=group)
        loaded["two"] = state_of(two[1], model.named_parameters())
    if rank == 0:
        model = case.model()
        one = load(model, case.fused(model.parameters()), no_dist=True)
        loaded["one"] = state_of(one[1], model.named_parameters())
    dist.barrier()
    (after,) = stepped_alike((sharded.model, optimizer))
    again = stepped_alike(*([two] if rank < 2 else []), *([one] if rank == 0 else []))
    return {"saved": saved, "loaded": loaded, "after": after, "again": again}


def whole_state_dict(rank: int, kind: str, name: str, broadcast: bool) -> dict[str, Any]:
    """The whole state in one dict, into an optimizer of the same processes."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    case = CASES[name]
    sharded, other = shard(kind, case.model()), shard(kind, case.model())
    optimizer, again = case.fused(sharded.model.parameters()), case.fused(other.model.parameters())
    train(case, sharded, optimizer, batches(2), fused=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    saved = get_optimizer_state_dict(sharded.model, optimizer, options=StateDictOptions(full_state_dict=True))
    whole = {key: dict(value) for key, value in saved["state"].items()}
    set_optimizer_state_dict(other.model, again, saved if rank == 0 or not broadcast else {}, options=options)
    pairs = (optimizer, sharded.model), (again, other.model)
    states = [state_of(each, model.named_parameters()) for each, model in pairs]
    return {"whole": whole, "states": states}


NONFINITE = {
    f"nonfinite-{kind}-{name}": (nonfinite, (kind, CASES[name]))
    for kind in ("hsdp", "tp-fsdp")
    for name in ("clipped", "norm-inf", "reference", "emulated-pair")
    if name in CASES
}
PIPELINES = {
    f"pipeline-{name}-{scaler}-{at}": (pipeline, (CASES[name], scaler, at))
    for name, scaler, at in (
        ("clipped", None, None),
        ("norm-inf", None, None),
        ("reference", "ours", 2),
        ("clipped", "ours", 0),
        ("momentum", "ours", 2),
        ("clipped", "stock", 0),
        ("momentum", "stock", 2),
    )
}
CHECKPOINTS = {
    f"checkpoint-{kind}-{name}-{flat}": (checkpoint, (kind, name, flat))
    for kind, name, flat in (
        ("fsdp", "clipped", False),
        ("fsdp", "momentum", True),
        ("hsdp", "momentum", False),
        ("tp-fsdp", "clipped", True),
    )
}
WHOLE = {
    f"whole-{kind}-{name}-{broadcast}": (whole_state_dict, (kind, name, broadcast))
    for kind in ("fsdp", "hsdp")  # torch cannot deal out what tensor parallelism and fully_shard both have cut
    for name, broadcast in (("clipped", False), ("momentum", True))
}
SCENARIOS |= {**NONFINITE, **PIPELINES, **CHECKPOINTS, **WHOLE}
UNEQUAL = {
    f"unequal-{name}": (unequal, ("tp-fsdp", CASES[name]))
    for name in ("unclipped", "reference-norm-inf", "emulated", "emulated-pair")
    if name in CASES
}
SCENARIOS |= UNEQUAL
SCENARIOS |= {f"disagreeing-{kind}": (disagreeing, (kind,)) for kind in ("fsdp", "tp-fsdp")}
SCENARIOS |= {"unrelated-meshes": (unrelated_meshes, ()), "swapped": (swapped, ())}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes_of(SCENARIOS, WORLD, request, tmp_path_factory)


@each_of(TRAININGS)
def test_trains_as_one_process_with_the_whole_batch(outcomes: Outcomes, scenario: str) -> None:
    case: Case = TRAININGS[scenario][1][1]
    results, expected = outcomes[scenario], alone(case)
    assert_reports(results, case, expected)
    for result in results:
        assert_close(result.parameters, expected.parameters)
        if result.state:
            assert_close(result.state, expected.state)
            if case.write_back:
                assert_close(dict(enumerate(result.grads)), dict(enumerate(expected.grads)))


@each_of(OVERFLOWS)
def test_an_overflow_in_one_process_skips_the_step_in_all(outcomes: Outcomes, scenario: str) -> None:
    _, case, _, at, _ = OVERFLOWS[scenario][1]
    assert_skipped(outcomes[scenario], case, at)


@each_of(NONFINITE)
def test_a_norm_that_is_not_finite_is_an_error_in_all_processes(outcomes: Outcomes, scenario: str) -> None:
    for outcome in outcomes[scenario]:
        assert outcome["refused"].startswith("RuntimeError: The total norm")
        assert "is nan, so it cannot be clipped" in outcome["refused"]


@each_of(UNEQUAL)
def test_an_overflow_skips_all_whatever_it_is_in(outcomes: Outcomes, scenario: str) -> None:
    assert [found_inf for *_, found_inf in outcomes[scenario]] == [1.0] * WORLD


@pytest.mark.parametrize("kind", ["fsdp", "tp-fsdp"])
def test_one_process_that_disagrees_stops_all(outcomes: Outcomes, kind: str) -> None:
    for outcome in outcomes[f"disagreeing-{kind}"]:
        assert outcome["refused"].startswith("ValueError: the optimizers of processes 0 and 2 differ in clip_grad")


@each_of(PIPELINES)
def test_sharded_stages_of_a_pipeline_clip_and_skip_together(outcomes: Outcomes, scenario: str) -> None:
    case, scaler, at = PIPELINES[scenario][1]
    expected = alone(case, [batch for index, batch in enumerate(batches(4)) if index != at])
    for outcome in outcomes[scenario]:
        assert_close(outcome["parameters"], expected.parameters)
        assert repr(outcome["reports"]) == repr(outcomes[scenario][0]["reports"])
        if scaler:
            assert outcome["scales"] == {0: [4.0, 4.0, 8.0, 8.0], 2: [8.0, 16.0, 8.0, 8.0]}[at]
        kept = [norm for index, (norm, *_) in enumerate(outcome["reports"]) if index != at]
        assert kept == [None if want is None else pytest.approx(want, rel=1e-12) for want in expected.reports]
        for index, (*_, found_inf) in enumerate(outcome["reports"]):
            assert found_inf == (float(index == at) if scaler else None)


def test_meshes_without_a_common_root_have_no_norm_together(outcomes: Outcomes) -> None:
    for outcome in outcomes["unrelated-meshes"]:
        for message in outcome.values():
            assert re.match(r"ValueError: parameter .* is dealt out over .*, parameter .* over DeviceMesh", message)
            assert "meshes without a common root" in message


def test_a_parameter_that_is_dealt_out_in_another_way_has_its_norm_then(outcomes: Outcomes) -> None:
    for squares in outcomes["swapped"]:
        assert squares == pytest.approx([4.0, 8.0, 2.0])


@each_of(CHECKPOINTS)
def test_what_four_processes_save_two_load_and_one(outcomes: Outcomes, scenario: str) -> None:
    found = outcomes[scenario]
    for outcome in found:
        assert_equal(outcome["saved"], found[0]["saved"])
        for state in outcome["loaded"].values():
            assert_equal(state, found[0]["saved"])
        for again in outcome["again"]:
            assert_close(again, found[0]["after"])
    assert [sorted(outcome["loaded"]) for outcome in found] == [["one", "two"], ["two"], [], []]


@each_of(WHOLE)
def test_the_whole_state_in_one_dict(outcomes: Outcomes, scenario: str) -> None:
    for outcome in outcomes[scenario]:
        saved, loaded = outcome["states"]
        assert_equal(loaded, saved)
    assert_equal(outcomes[scenario][0]["whole"], outcomes[scenario][0]["states"][0])
