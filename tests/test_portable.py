"""State on its way through a file: it comes back in the types that it had, wherever it was kept."""

from __future__ import annotations

import collections
import enum
import json
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from engine_cases import assert_same as assert_same_state
from engine_cases import config, train

from fusedopt.training.engine import EpochBasedTrainLoop, Hook, Runner
from fusedopt.training.engine.checkpoint import read_checkpoint, write_checkpoint
from fusedopt.training.portable import as_before, portable
from fusedopt.training.schedulers import MultiStepLR, _ParamScheduler
from fusedopt.training.wrappers import OptimWrapper, SkipAwareScheduler


class Phase(enum.Enum):
    UP = "up"
    DOWN = "down"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Place(NamedTuple):
    epoch: int
    share: float


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other), (one, other)
    if isinstance(one, dict):
        assert list(one) == list(other) and list(map(type, one)) == list(map(type, other))
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple, collections.deque)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, (np.ndarray, torch.Tensor)):
        assert one.dtype == other.dtype and (one == other).all()
    else:
        assert one == other


#: Before the run, and after it.
STATES: dict[str, tuple[Any, Any]] = {
    "Counter": (collections.Counter([3]), collections.Counter([2, 2, 5])),
    "empty Counter": (collections.Counter(), collections.Counter([2, 2])),
    "defaultdict": (collections.defaultdict(list), collections.defaultdict(list, a=[1], b=[2])),
    "OrderedDict": (collections.OrderedDict(a=1), collections.OrderedDict(b=1, a=2)),
    "tuple": ((0.9, 0.999), (0.8, 0.999)),
    "list of tuples": ([(1, 2)], [(3, 4), (5, 6)]),
    "dict of tuples": ({"a": (1,)}, {"a": (2,), "b": (3,)}),
    "named tuple": (Place(0, 0.0), Place(3, 0.5)),
    "set": ({1}, {1, 2}),
    "frozenset": (frozenset({1}), frozenset({1, 2})),
    "deque": (collections.deque([1], maxlen=3), collections.deque([2, 3], maxlen=3)),
    "enum": (Phase.UP, Phase.DOWN),
    "whole-number enum": (Level.LOW, Level.HIGH),
    "keys of an enum": ({Phase.UP: 1}, {Phase.DOWN: 2, Phase.UP: 3}),
    "list of enums": ([Phase.UP], [Phase.DOWN, Phase.UP]),
    "numpy number": (np.float64(0.1), np.float64(0.3)),
    "small numpy number": (np.float32(0.1), np.float32(0.3)),
    "numpy array": (np.zeros(2, np.int32), np.array([3, 4], np.int32)),
    "numbers as keys": ({1: 0.5}, {2: 0.5, 30: 0.25}),
    "plain": ({"a": [1, 2.5, "x", True, None]}, {"a": [2, 3.5, "y", False, None]}),
    "None before": (None, {"a": (1, 2)}),
}
JSON_KEEPS = set(STATES) - {"None before", "empty Counter"}


@pytest.mark.parametrize("name", STATES)
def test_a_type_comes_back(name, tmp_path):
    before, after = STATES[name]
    write_checkpoint(dict(state=portable(after)), tmp_path / "state.pth")
    read = read_checkpoint(tmp_path / "state.pth")["state"]
    assert_same(as_before(read, before), after)
    if name in JSON_KEEPS:
        written = portable(after)
        text = json.dumps(sorted(written) if isinstance(written, set) else written)
        assert_same(as_before(json.loads(text), before), after)


def test_what_does_not_correspond_stays():
    assert as_before(3, {"a": 1}) == 3
    assert as_before([1], 2.0) == [1]
    assert as_before("sideways", Phase.UP) == "sideways"
    assert as_before({"a": 1}, [1]) == {"a": 1}
    tensor = torch.ones(2)
    assert as_before(tensor, (1, 2)) is tensor and portable(tensor) is tensor


class Remembering(_ParamScheduler):
    """Halves the learning rate in every second epoch, and keeps notes in every type."""

    def __init__(self, optimizer, *args, **kwargs):
        self.seen = collections.Counter()
        self.by_parity = collections.defaultdict(list)
        self.order = collections.OrderedDict(first=1)
        self.span = (0, 0)
        self.phase = Phase.UP
        self.best = np.float64(1.0)
        self.history = np.zeros(2)
        super().__init__(optimizer, "lr", *args, **kwargs)

    def _next(self, value, base):
        step = self.last_step
        self.seen[step % 2] += 1
        self.by_parity[step % 2].append(step)
        self.order.move_to_end("first")
        self.span = (self.span[1], step)
        self.phase = {Phase.UP: Phase.DOWN, Phase.DOWN: Phase.UP}[self.phase]
        self.best = np.float64(min(self.best, 1 / (1 + step)))
        self.history = np.array([self.history[1], step])
        return value * 0.5 if self.phase is Phase.UP and self.seen[7] == 0 else value


class Noting(Hook):
    """Keeps what it knows in the message hub, in types of its own."""

    def before_run(self, runner):
        if runner.message_hub.get_info("counts") is None:
            runner.message_hub.update_info("counts", collections.defaultdict(int))
            runner.message_hub.update_info("phase", Phase.UP)
            runner.message_hub.update_info("best", np.float64(9.0))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        hub = runner.message_hub
        hub.get_info("counts")[batch_idx] += 1
        hub.update_info("phase", Phase.DOWN)
        hub.update_info("best", min(hub.get_info("best"), np.float64(runner.iter)))


def test_states_of_ones_own_go_on_in_a_run(tmp_path):
    cfg = config(tmp_path / "straight", validates=False, param_scheduler=dict(type=Remembering))
    hook, again = Noting(), Noting()
    straight = train(cfg, hook)
    resumed = train(
        {**cfg, "work_dir": str(tmp_path), "resume": True, "load_from": str(tmp_path / "straight" / "epoch_2.pth")},
        again,
    )
    for one, other in zip(resumed.param_schedulers, straight.param_schedulers, strict=True):
        assert_same(one.state_dict(), other.state_dict())
    for name in ("counts", "phase", "best"):
        assert_same(resumed.message_hub.get_info(name), straight.message_hub.get_info(name))


def test_a_loop_of_ones_own_keeps_its_types(tmp_path):
    class Phased(EpochBasedTrainLoop):
        """Counts batches by their number, and changes its phase with each epoch."""

        phase, counts = Phase.UP, None

        def progress(self):
            counts = collections.defaultdict(int) if self.counts is None else self.counts
            return {**super().progress(), "phase": self.phase, "counts": counts}

        def resume(self, meta, process_state):
            self.phase, self.counts = meta["phase"], meta["counts"]
            super().resume(meta, process_state)

        def run_epoch(self):
            super().run_epoch()
            self.phase = Phase.DOWN if self.phase is Phase.UP else Phase.UP
            self.counts = self.progress()["counts"]
            self.counts[self.epoch] += 1

    cfg = config(tmp_path, validates=False, train_cfg=dict(type=Phased, max_epochs=4))
    straight = train(cfg)
    resumed = train({**cfg, "resume": True, "load_from": str(tmp_path / "epoch_3.pth")})
    for name in ("phase", "counts"):
        assert type(getattr(resumed.train_loop, name)) is type(getattr(straight.train_loop, name))
    # The file of an epoch is written before the loop is through with it.
    assert resumed.train_loop.counts == {1: 1, 2: 1, 4: 1}


def test_a_setting_of_a_group_keeps_its_type(tmp_path):
    wrapper = dict(
        optimizer=dict(type="FusedAdamW", lr=0.01),
        paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=2.0, phase=Phase.DOWN, sizes=(1, 2)))),
    )
    cfg = config(tmp_path, validates=False, optim_wrapper=wrapper)
    straight = train(cfg)
    resumed = Runner.from_cfg({**cfg, "resume": True})
    resumed.load_or_resume()
    (group, *_) = [group for group in resumed.optim_wrapper.param_groups if "phase" in group]
    assert group["phase"] is Phase.DOWN and group["sizes"] == (1, 2)
    assert_same_state(
        resumed.optim_wrapper.optimizer.state_dict()["state"], straight.optim_wrapper.optimizer.state_dict()["state"]
    )


def test_a_model_keeps_the_types_of_its_extra_state(tmp_path):
    class Counting(torch.nn.Linear):
        counts: ClassVar = collections.Counter(a=1)

        def get_extra_state(self):
            return self.counts

        def set_extra_state(self, state):
            self.counts = state

    def cfg(**changes):
        model = Runner.from_cfg(config(tmp_path)).model
        model.head = Counting(8, 3)
        return config(tmp_path, model=model, **changes)

    train(first := cfg())
    first["model"].head.counts.update(b=2)
    for hooks in ([], [dict(type="EMAHook")]):
        train(cfg(custom_hooks=hooks))
        resumed = Runner.from_cfg(cfg(resume=True, custom_hooks=hooks))
        resumed.model.head.counts = collections.Counter()
        resumed.load_or_resume()
        assert_same(resumed.model.head.counts, collections.Counter(a=1, b=2))


def test_information_that_cannot_be_saved_is_named_once(tmp_path, capsys):
    class Opaque(Hook):
        def before_run(self, runner):
            runner.message_hub.update_info("handle", [1, self])

    train(config(tmp_path), Opaque())
    text = capsys.readouterr().out
    assert text.count("'handle' of the message hub is not saved") == 1
    assert "handle[1] (Opaque)" in text


def optimizer() -> torch.optim.Optimizer:
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made._opt_called = True
    return made


def test_files_that_were_written_before_load():
    """They have a plain dict for the milestones."""
    sgd = optimizer()
    scheduler = MultiStepLR(sgd, milestones=[2, 2], gamma=0.5)
    old = {**scheduler.state_dict(), "milestones": {2: 2}}
    other = optimizer()
    loaded = MultiStepLR(other, milestones=[2, 2], gamma=0.5)
    loaded.load_state_dict(old)
    for _ in range(3):
        scheduler.step(), loaded.step()
        assert other.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
    assert other.param_groups[0]["lr"] == 0.25 and isinstance(loaded.milestones, collections.Counter)


def test_torchs_scheduler_in_ours_keeps_its_types():
    sgd = optimizer()
    wrapper = OptimWrapper(sgd)
    aware = SkipAwareScheduler(torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 1]), wrapper)
    aware.load_state_dict(portable(aware.state_dict()))
    assert_same(aware.scheduler.milestones, collections.Counter([1, 1]))
