"""What grows with the groups, tensors or iterations: no faster than these, and with equal results."""

from __future__ import annotations

import collections
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedopt
from benchmarks.growth import OPERATIONS, Many, exponent, groups, growth_table, measure_growth, parameters, stepped
from fusedopt.messages import parameter_name
from fusedopt.optimizers import base
from fusedopt.training.constructors import DefaultOptimWrapperConstructor
from fusedopt.training.schedulers import CosineAnnealingLR, LinearMomentum, simulate, simulate_schedule

FEW = 150


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C. All that one of C does, such as a copy, counts as one."""
    calls = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # what is collected calls functions, too
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def growth(prepare: Callable[[int], Callable[[], object]]) -> float:
    """By how much the calls grow when there is twice as much to do."""
    prepare(20)()  # whatever is imported and remembered at first
    few, many = (calls_of(prepare(count)) for count in (FEW, 2 * FEW))
    return many / few


@pytest.mark.filterwarnings("ignore:paramwise_cfg")
@pytest.mark.parametrize("name", OPERATIONS)
def test_twice_as_much_is_at_most_a_little_more_than_twice_the_work(name: str) -> None:
    assert growth(OPERATIONS[name].ours) <= 2.2


def test_a_walk_over_all_groups_for_each_would_be_seen() -> None:
    stock = OPERATIONS["construct"].stock
    assert stock is not None
    assert growth(stock) > 2.5


def test_a_parameter_is_named_without_a_walk_over_all_names() -> None:
    class Walked(list[str]):
        def __iter__(self) -> NoReturn:
            raise AssertionError

    group = {"params": parameters(2), "param_names": Walked(["first", "second"])}
    assert parameter_name(group, 0, 1) == "parameter 'second' (param_groups[0]['params'][1], shape (8,))"


def test_the_norm_of_parts_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(base, "refuse_what_cannot_be_added_up", lambda groups: asked.append(len(groups)))
    optimizer = fusedopt.FusedAdamW(groups(5), clip_grad={"max_norm": 1.0})
    assert asked == [5]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert asked == [5, 6]


def test_the_exponent_is_that_between_the_last_counts() -> None:
    assert exponent({"100": 5.0, "1000": 1.0, "10000": 100.0}) == pytest.approx(2.0)


def test_the_table_shows_both() -> None:
    taken = {"100": 1e-3, "1000": 1e-2, "10000": 0.1}
    found = {"alone": {"counted": "groups", "ours": taken, "torch": None}}
    found["both"] = {"counted": "tensors", "ours": taken, "torch": {**taken, "10000": 1.0}}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in growth_table(found).splitlines()]
    assert rows[0] == ["operation", "n", "100", "1,000", "10,000", "exponent", "torch at 10,000", "exponent"]
    assert rows[2] == ["alone", "groups", "1 ms", "10 ms", "100 ms", "1.00", "", ""]
    assert rows[3] == ["both", "tensors", "1 ms", "10 ms", "100 ms", "1.00", "1 s", "2.00"]


def test_all_is_measured_at_each_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import growth as measured

    monkeypatch.setattr(measured, "OPERATIONS", {name: OPERATIONS[name] for name in ("construct", "fuse")})
    found = measure_growth(2, (2, 4))
    assert {name: (list(each["ours"]), each["torch"] and list(each["torch"])) for name, each in found.items()} == {
        "construct": ([2, 4], [2, 4]),
        "fuse": ([2, 4], None),
    }
    assert all(seconds > 0 for seconds in found["construct"]["torch"].values())


def refusal(function: Callable[[], object]) -> tuple[type[BaseException], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    return type(caught.value), str(caught.value)


class TestGroupsThatDoNotFit:
    """While a constructor runs, torch compares no groups; what it has against them is said as by torch."""

    @staticmethod
    def named(index: int) -> dict[str, Any]:
        return {"params": [(f"name{index}", nn.Parameter(torch.ones(2)))]}

    @staticmethod
    def same(make: Callable[[], list[dict[str, Any]]]) -> tuple[type[BaseException], str]:
        ours = make()
        before = [dict(group) for group in ours]
        found = refusal(lambda: fusedopt.FusedAdamW(ours))
        assert found == refusal(lambda: torch.optim.AdamW(make()))
        for group, was in zip(ours, before, strict=True):
            assert group.keys() == was.keys()
            assert group["params"] is was["params"]
        return found

    def test_a_parameter_in_two_groups(self) -> None:
        shared = nn.Parameter(torch.ones(2))
        kind, message = self.same(lambda: [*groups(3), {"params": [shared]}, *groups(2), {"params": shared}])
        assert (kind, message) == (ValueError, "some parameters appear in more than one parameter group")

    @pytest.mark.parametrize("first_named", [True, False])
    def test_names_in_some_groups(self, first_named: bool) -> None:
        def mixed() -> list[dict[str, Any]]:
            both = [[self.named(0), self.named(1)], groups(2)]
            return [*both[not first_named], *both[first_named]]

        assert "without names" in self.same(mixed)[1]

    def test_names_in_all_groups(self) -> None:
        optimizer = fusedopt.FusedAdamW([self.named(index) for index in range(3)])
        assert [group["param_names"] for group in optimizer.param_groups] == [["name0"], ["name1"], ["name2"]]

    def test_what_torch_has_against_one_parameter(self) -> None:
        derived = nn.Parameter(torch.ones(2)) * 2
        assert self.same(lambda: [*groups(2), {"params": [derived]}])[1] == "can't optimize a non-leaf Tensor"

    def test_afterwards_each_group_is_compared_with_all(self) -> None:
        optimizer = fusedopt.FusedAdamW(groups(3))
        last = optimizer.param_groups[-1]["params"][0]
        before = list(optimizer.param_groups)
        for group in ({"params": [last]}, self.named(0)):
            assert refusal(lambda group=group: optimizer.add_param_group(group))[0] is ValueError
            assert optimizer.param_groups == before
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert len(optimizer.param_groups) == 4

    def test_a_subclass_sees_each_group_and_may_add_to_it(self) -> None:
        extra, seen = nn.Parameter(torch.ones(2)), []

        class Adding(fusedopt.FusedAdamW):
            def add_param_group(self, param_group: dict[str, Any]) -> None:
                seen.append(len(self.param_groups))
                super().add_param_group(param_group)
                if len(self.param_groups) == 1:
                    self.param_groups[0]["params"].append(extra)

        kind, message = refusal(lambda: Adding([*groups(2), {"params": [extra]}]))
        assert (kind, message) == (ValueError, "some parameters appear in more than one parameter group")
        assert seen == [0, 1, 2]

    def test_a_subclass_may_put_parameters_into_a_former_group(self) -> None:
        class Joining(fusedopt.FusedAdamW):
            def add_param_group(self, param_group: dict[str, Any]) -> None:
                super().add_param_group(param_group)
                if len(self.param_groups) == 2:
                    self.param_groups[0]["params"] += self.param_groups.pop()["params"]

        first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
        assert [group["params"] for group in Joining([{"params": [first]}, {"params": [second]}]).param_groups] == [
            [first, second]
        ]
        kind, message = refusal(lambda: Joining([{"params": [param]} for param in (first, second, second)]))
        assert (kind, message) == (ValueError, "some parameters appear in more than one parameter group")

    def test_a_class_between_ours_and_torchs_sees_all_groups(self) -> None:
        seen = []

        class Between(torch.optim.Optimizer):
            def add_param_group(self, param_group: dict[str, Any]) -> None:
                seen.append(len(self.param_groups))
                super().add_param_group(param_group)

        class Mixed(fusedopt.FusedAdamW, Between):
            pass

        assert len(Mixed(groups(3)).param_groups) == 3
        assert seen == [0, 1, 2]

    def test_an_error_that_is_caught_on_the_way_leaves_the_group_as_it_was(self) -> None:
        class Patient(fusedopt.FusedAdamW):
            def add_param_group(self, param_group: dict[str, Any]) -> None:
                before = dict(param_group)
                try:
                    super().add_param_group(param_group)
                except ValueError:
                    assert param_group == before
                    super().add_param_group({**param_group, "params": [nn.Parameter(torch.ones(2))]})

        shared = nn.Parameter(torch.ones(2))
        optimizer = Patient([{"params": [shared]}, {"params": [shared]}, *groups(1)])
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]


class TestUnfuse:
    def test_groups_that_do_not_fit_are_refused_as_by_torch(self) -> None:
        optimizer = stepped(groups(3))
        optimizer.param_groups[2]["params"] = [optimizer.param_groups[0]["params"][0]]
        assert refusal(lambda: fusedopt.unfuse(optimizer))[1].startswith("some parameters appear in more than one")

    def test_the_groups_are_the_same_dicts(self) -> None:
        optimizer = stepped(groups(3))
        held = optimizer.param_groups
        twin = fusedopt.unfuse(optimizer)
        assert twin.param_groups is held
        assert held[0].keys() >= twin.defaults.keys()
        assert [len(group["params"]) for group in held] == [1, 1, 1]


class TestZeroRedundancyOptimizer:
    @pytest.fixture(autouse=True)
    def _process_group(self, tmp_path: Path) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @staticmethod
    def of(made: list[dict[str, Any]]) -> Any:
        return fusedopt.ZeroRedundancyOptimizer(made, "FusedAdamW", lr=0.1, clip_grad={"max_norm": 1.0})

    def prepared(self, count: int) -> Callable[[], object]:
        made = groups(count)
        return lambda: self.of(made)

    def test_it_is_constructed_in_proportion_to_its_groups(self) -> None:
        assert growth(self.prepared) <= 2.2

    def test_groups_that_do_not_fit_are_refused_as_by_torch(self) -> None:
        optimizer = self.of(groups(2))
        shared = {"params": [optimizer.param_groups[0]["params"][0]]}
        for make in (
            lambda: self.of([dict(shared), *groups(1), dict(shared)]),
            lambda: optimizer.add_param_group(shared),
        ):
            assert refusal(make) == (ValueError, "some parameters appear in more than one parameter group")
        optimizer.add_param_group(groups(1)[0])
        assert [len(each.param_groups) for each in (optimizer, optimizer.optim)] == [3, 3]


class TestSharedParameters:
    """A constructor remembers the parameters of its groups; a subclass may put some into groups that are there."""

    def test_a_parameter_added_to_a_former_group_is_found(self) -> None:
        class Tied(DefaultOptimWrapperConstructor):
            def add_params(self, params: Any, module: nn.Module, prefix: str = "", is_dcn_module: Any = None) -> None:
                if prefix == "parts.1":
                    params[0]["params"].append(module.weight)
                super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)

        cfg = dict(optimizer=dict(type="FusedSGD", lr=0.1))
        with pytest.raises(ValueError, match=r"'parts\.1\.weight' is shared: it is also 'parts\.0\.weight'"):
            Tied(cfg, dict(bias_lr_mult=2))(Many(4))
        built = Tied(cfg, dict(bias_lr_mult=2, bypass_duplicate=True))(Many(4)).optimizer
        assert [len(group["params"]) for group in built.param_groups] == [2, 1, 1]

    def test_a_constructor_may_be_called_again(self) -> None:
        construct = DefaultOptimWrapperConstructor(dict(optimizer=dict(type="FusedSGD", lr=0.1)), dict(bias_lr_mult=2))
        model = Many(4)
        assert [len(construct(model).optimizer.param_groups) for _ in range(2)] == [4, 4]


#: Settings of a run's schedulers, each of 3 epochs of 40 iterations.
SCHEDULES: dict[str, list[dict[str, Any]]] = {
    "warm-up and cosine": [
        dict(type="LinearLR", start_factor=1e-3, end=1, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", T_max=2, eta_min=1e-5, begin=1, end=3, convert_to_iter_based=True),
    ],
    "a cosine that rises again": [dict(type="CosineAnnealingLR", T_max=7, eta_min_ratio=0.1, by_epoch=False)],
    "overlapping": [
        dict(type="LinearLR", start_factor=0.1, begin=3, end=50, by_epoch=False),
        dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=20, end=100, by_epoch=False),
        dict(type="ExponentialLR", gamma=0.5, begin=0, end=2),
    ],
    "steps": [
        dict(type="StepLR", step_size=9, gamma=0.7, by_epoch=False),
        dict(type="MultiStepLR", milestones=[1, 2, 2], gamma=0.3),
        dict(type="ConstantLR", factor=0.5, begin=5, end=17, by_epoch=False),
    ],
    "restarts": [
        dict(type="CosineRestartLR", periods=[20, 30, 10], restart_weights=[1, 0.5, 0.2], eta_min=1e-3, by_epoch=False),
    ],
    "by epoch": [dict(type="CosineAnnealingLR", T_max=3), dict(type="LinearLR", end=2)],
    "other values": [
        dict(type="CosineAnnealingWeightDecay", eta_min=1e-3, T_max=30, by_epoch=False),
        dict(type="LinearMomentum", start_factor=0.5, end=60, by_epoch=False),
        dict(type="ExponentialLR", gamma=0.99, by_epoch=False),
    ],
    "one cycle": [
        dict(type="OneCycleLR", eta_max=0.1, total_steps=120, by_epoch=False),
        dict(type="CosineAnnealingMomentum", T_max=3),
    ],
    "three phases": [
        dict(
            type="OneCycleLR", eta_max=0.1, total_steps=130, three_phase=True, anneal_strategy="linear", by_epoch=False
        ),
        dict(type="StepLR", step_size=30, by_epoch=False),
    ],
    "one that moves another's bases": [
        dict(type="OneCycleLR", eta_max=0.1, total_steps=120, by_epoch=False),
        dict(type="ExponentialParamScheduler", param_name="max_lr", gamma=0.9, by_epoch=False),
    ],
    "with one of torch's": [
        dict(type="CosineAnnealingWarmRestarts", T_0=7, by_epoch=False),
        dict(type="LinearLR", end=2),
    ],
}


@pytest.fixture(params=list(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> dict[str, Any]:
    rules = {"parts.0": dict(lr_mult=0.3), "parts.1.bias": dict(lr_mult=0.7, decay_mult=0.0)}
    optimizer = dict(type="FusedAdamW", lr=0.1, weight_decay=0.05)
    return dict(
        optim_wrapper=dict(optimizer=optimizer, paramwise_cfg=dict(custom_keys=rules)),
        train_cfg=dict(max_epochs=3),
        param_scheduler=SCHEDULES[request.param],
    )


def test_a_simulation_is_that_of_schedulers_stepped_one_by_one(
    schedule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = simulate_schedule(schedule, model=Many(4), epoch_length=40)
    monkeypatch.setattr(simulate, "can_run_ahead", lambda *_: False)
    by_steps = simulate_schedule(schedule, model=Many(4), epoch_length=40)
    assert ahead.spans == by_steps.spans
    assert len(ahead.curves) == len(by_steps.curves) > 0
    for ours, theirs in zip(ahead.curves, by_steps.curves, strict=True):
        assert (ours.param_name, ours.groups, ours.names) == (theirs.param_name, theirs.groups, theirs.names)
        assert ours.values.tolist() == theirs.values.tolist()


def test_a_simulation_does_not_step_the_schedulers_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: collections.Counter[str] = collections.Counter()
    for cls in (CosineAnnealingLR, LinearMomentum):
        original = cls.step

        def step(self: Any, original: Any = original) -> None:
            steps[type(self).__name__] += 1
            original(self)

        monkeypatch.setattr(cls, "step", step)
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="FusedAdamW", lr=0.1)),
        train_cfg=dict(max_iters=500),
        param_scheduler=[
            dict(type="CosineAnnealingLR", T_max=500, by_epoch=False),
            dict(type="LinearMomentum", start_factor=0.5, end=100, by_epoch=False),
        ],
    )
    simulate_schedule(cfg, model=Many(2))
    assert steps == {"CosineAnnealingLR": 1, "LinearMomentum": 1}  # those at construction


def test_a_scheduler_with_a_rule_of_its_own_is_stepped() -> None:
    class Halving(CosineAnnealingLR):
        def _next(self, value: Any, base: Any) -> Any:
            return value / 2

    assert not simulate.can_run_ahead([Halving(stepped(groups(1)), T_max=5)], [{"lr": 0.1}], ["lr"])
    assert simulate.can_run_ahead([CosineAnnealingLR(stepped(groups(1)), T_max=5)], [{"lr": 0.1}], ["lr"])
    assert not simulate.can_run_ahead([], [{"lr": torch.tensor(0.1)}], ["lr"])
