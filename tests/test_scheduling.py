"""SkipAwareScheduler: schedulers stand still where a step was skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, StepLR

from fusedopt import AmpOptimWrapper, FusedSGD, OptimWrapper, OptimWrapperDict, SkipAwareScheduler

CLASSES = [pytest.param(cls, id=cls.__name__) for cls in (torch.optim.SGD, FusedSGD)]
#: Steps 1, 4 and 5 overflow.
OVERFLOWS = [True, False, False, True, True, False, False]


class Counter:
    """A scheduler that counts its steps."""

    count = 0

    def step(self) -> None:
        self.count += 1

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict) -> None:
        self.count = state_dict["count"]


def make_wrapper(cls, **settings) -> tuple[nn.Parameter, AmpOptimWrapper]:
    param = nn.Parameter(torch.ones(2))
    return param, AmpOptimWrapper(optimizer=cls([param], lr=0.1), loss_scale=4.0, **settings)


def update(param: nn.Parameter, wrapper: OptimWrapper, overflow: bool = False) -> None:
    wrapper.update_params(param.sum() * (float("inf") if overflow else 1.0))


@pytest.mark.parametrize("cls", CLASSES)
def test_waiting_it_advances_with_the_steps_that_were_made(cls):
    param, wrapper = make_wrapper(cls)
    scheduler = SkipAwareScheduler(Counter(), wrapper, wait=True)
    counts = []
    for overflow in OVERFLOWS:
        update(param, wrapper, overflow)
        scheduler.step()
        counts.append(scheduler.count)
    assert counts == [0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("cls", CLASSES)
def test_by_default_it_lags_one_step(cls):
    param, wrapper = make_wrapper(cls)
    scheduler = SkipAwareScheduler(Counter(), wrapper)
    counts = []
    for overflow in OVERFLOWS:
        update(param, wrapper, overflow)
        scheduler.step()
        counts.append(scheduler.count)
    assert counts == [1, 1, 2, 3, 3, 3, 4], "one ahead after each skipped step, and right again at the next call"


def test_without_it_torchs_scheduler_advances_on_a_skipped_step():
    param, wrapper = make_wrapper(FusedSGD)
    plain = LinearLR(wrapper.optimizer, start_factor=0.5, total_iters=2)
    update(param, wrapper, overflow=True)
    plain.step()
    assert wrapper.get_lr() == {"lr": [pytest.approx(0.075)]}

    param, wrapper = make_wrapper(FusedSGD)
    aware = SkipAwareScheduler(LinearLR(wrapper.optimizer, start_factor=0.5, total_iters=2), wrapper, wait=True)
    update(param, wrapper, overflow=True)
    aware.step()
    assert wrapper.get_lr() == {"lr": [0.05]}
    update(param, wrapper)
    aware.step()
    assert aware.get_last_lr() == [pytest.approx(0.075)]


@pytest.mark.parametrize("wait", [False, True])
def test_an_iteration_without_a_step_advances(wait):
    param, wrapper = make_wrapper(FusedSGD, accumulative_counts=2)
    scheduler = SkipAwareScheduler(Counter(), wrapper, wait=wait)
    counts = []
    for overflow in [False, True, False, False, False, False]:
        update(param, wrapper, overflow)
        scheduler.step()
        counts.append(scheduler.count)
    assert counts == ([1, 1, 2, 3, 4, 5] if wait else [1, 2, 2, 3, 4, 5]), "the step after iteration 2 is skipped"


@pytest.mark.parametrize("wait", [False, True])
def test_where_nothing_can_be_skipped_it_is_the_scheduler(wait):
    param = nn.Parameter(torch.ones(2))
    wrapper = OptimWrapper(FusedSGD([param], lr=0.1))
    scheduler = SkipAwareScheduler(StepLR(wrapper.optimizer, step_size=1, gamma=0.5), wrapper, wait=wait)
    for _ in range(3):
        update(param, wrapper)
        scheduler.step()
    assert wrapper.get_lr() == {"lr": [0.0125]}


def test_a_checkpoint_between_a_skip_and_its_correction():
    param, wrapper = make_wrapper(FusedSGD)
    scheduler = SkipAwareScheduler(Counter(), wrapper)
    update(param, wrapper, overflow=True)
    scheduler.step()
    saved = scheduler.state_dict()
    assert saved == {"count": 1, "all_were_skipped": True, "some_were_made": False}

    resumed = SkipAwareScheduler(Counter(), wrapper)
    resumed.load_state_dict(saved)
    assert saved == {"count": 1, "all_were_skipped": True, "some_were_made": False}
    update(param, wrapper)
    resumed.step()
    assert resumed.count == 1
    resumed.load_state_dict({"count": 7})  # of the scheduler alone
    update(param, wrapper)
    resumed.step()
    assert resumed.count == 8


#: Epochs of three steps each: the last overflows, all do, all but the first, none.
EPOCHS = [[False, False, True], [True, True, True], [False, True, True], [False, False, False]]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("wait", "expected"), [(True, [1, 1, 2, 3]), (False, [1, 2, 2, 3])])
def test_an_epoch_counts_when_it_made_a_step(cls, wait, expected):
    param, wrapper = make_wrapper(cls)
    scheduler = SkipAwareScheduler(Counter(), wrapper, wait=wait)
    counts = []
    for epoch in EPOCHS:
        for overflow in epoch:
            update(param, wrapper, overflow)
        scheduler.step()
        counts.append(scheduler.count)
    assert counts == expected


def test_an_overflow_at_the_end_does_not_cost_the_epoch():
    param, wrapper = make_wrapper(FusedSGD)
    scheduler = SkipAwareScheduler(StepLR(wrapper.optimizer, step_size=1, gamma=0.1), wrapper, wait=True)
    for iteration in range(10):
        update(param, wrapper, overflow=iteration == 9)
    scheduler.step()
    assert wrapper.get_lr() == {"lr": [pytest.approx(0.01)]}


def test_two_schedulers_of_one_wrapper():
    param, wrapper = make_wrapper(FusedSGD)
    by_step, by_epoch = (SkipAwareScheduler(Counter(), wrapper, wait=True) for _ in range(2))
    for epoch in EPOCHS:
        for overflow in epoch:
            update(param, wrapper, overflow)
            by_step.step()
        by_epoch.step()
    assert (by_step.count, by_epoch.count) == (6, 3)


@pytest.mark.parametrize("wait", [False, True])
def test_a_checkpoint_in_the_middle_of_an_epoch(wait):
    param, wrapper = make_wrapper(FusedSGD)
    scheduler = SkipAwareScheduler(Counter(), wrapper, wait=wait)
    update(param, wrapper)
    update(param, wrapper, overflow=True)
    saved = scheduler.state_dict()
    assert saved == {"count": 0, "all_were_skipped": False, "some_were_made": True}

    param, wrapper = make_wrapper(FusedSGD)
    resumed = SkipAwareScheduler(Counter(), wrapper, wait=wait)
    resumed.load_state_dict(saved)
    update(param, wrapper, overflow=True)
    resumed.step()
    assert resumed.count == 1, "a step of this epoch was made, before the checkpoint"
    update(param, wrapper)
    resumed.step()
    assert resumed.count == 2


def test_steps_are_counted_only_for_a_scheduler():
    param, wrapper = make_wrapper(FusedSGD)
    update(param, wrapper)
    assert wrapper._steps_made is None


def test_waits_for_no_flag_of_the_step_just_made(monkeypatch):
    param, wrapper = make_wrapper(FusedSGD)
    scheduler = SkipAwareScheduler(Counter(), wrapper)
    update(param, wrapper)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda flag: pytest.fail("read on the host"))
    scheduler.step()
    monkeypatch.undo()
    assert scheduler.count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cls", CLASSES)
def test_on_a_gpu_the_flag_travels_by_itself(cls):
    param = nn.Parameter(torch.ones(2, device="cuda"))
    wrapper = AmpOptimWrapper(optimizer=cls([param], lr=0.1), loss_scale=4.0)
    scheduler = SkipAwareScheduler(Counter(), wrapper)
    counts = []
    for overflow in OVERFLOWS:
        update(param, wrapper, overflow)
        scheduler.step()
        counts.append(scheduler.count)
        assert scheduler._pending._flag.is_pinned()
    assert counts == [1, 1, 2, 3, 3, 3, 4]


def test_needs_one_wrapper():
    _, wrapper = make_wrapper(FusedSGD)
    with pytest.raises(TypeError, match=r"must be one OptimWrapper.*got OptimWrapperDict"):
        SkipAwareScheduler(Counter(), OptimWrapperDict(gen=wrapper))
    with pytest.raises(TypeError, match="got FusedSGD"):
        SkipAwareScheduler(Counter(), wrapper.optimizer)
