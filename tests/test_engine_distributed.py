"""Two processes under torchrun: the training is that of one process with the batches of both."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_cases import Parts, assert_same, by_iterations, config, loader, recorded, state_of, train

from fusedopt.training.engine import DefaultSampler, Hook, InfiniteSampler, Runner, distributed
from fusedopt.training.engine.evaluator import BaseMetric

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

WORLD = 2
# Gradients of two halves, averaged, against those of the whole batch: the same sum in another order.
TOLERANCE = dict(rtol=1e-4, atol=1e-6)
QUIET = dict(type="Points", size=40, noise=0.0)


class Interrupted(Exception):
    pass


class Interrupt(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 8:
            raise Interrupted


def cfg(folder: Path | str, processes: int, **changes: Any) -> dict[str, Any]:
    """Batches of 8 in all, and nothing random in model and data."""
    data = {**loader(40, 8 // processes, shuffle=True), "dataset": QUIET}
    validation = {**loader(21, 4, shuffle=False), "dataset": dict(type="Points", size=21, noise=0.0)}
    settings: dict[str, Any] = dict(
        model=dict(type="PointNet", dropout=0.0),
        train_dataloader=data,
        val_dataloader=validation,
        launcher="pytorch" if processes > 1 else "none",
    )
    return config(folder, **{**settings, **changes})


def iterations(processes: int) -> dict[str, Any]:
    data = {**loader(40, 8 // processes, shuffle=True, sampler="InfiniteSampler"), "dataset": QUIET}
    return by_iterations(train_dataloader=data)


ACCUMULATE = dict(
    optim_wrapper=dict(optimizer=dict(type="FusedSGD", lr=0.1, momentum=0.9), accumulative_counts=4),
    default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3)),
    custom_hooks=[dict(type="SyncBuffersHook")],
    model=dict(type="PointNet", dropout=0.3, batch_norm=True),
    randomness=dict(seed=0, diff_rank_seed=True),
)
ZERO = dict(type="ZeroRedundancyOptimizer", optimizer_type="FusedAdamW", lr=1e-2, clip_grad=dict(max_norm=1.0))


SEPARATE = dict(
    model=dict(type=Parts, dropout=0.0),
    model_wrapper_cfg=dict(type="MMSeparateDistributedDataParallel"),
    optim_wrapper=dict(
        constructor="MultiOptimWrapperConstructor",
        backbone=dict(optimizer=dict(type="FusedAdamW", lr=1e-2)),
        head=dict(optimizer=dict(type="FusedSGD", lr=0.1)),
    ),
)
SHARDED = dict(optim_wrapper=dict(optimizer=ZERO))


# What runs in both processes ------------------------------------------------------------------------------------------


def plain(rank: int, folder: str) -> dict[str, Any]:
    runner = train(cfg(folder, WORLD))
    return dict(
        weights=[param.detach().clone() for param in runner.bare_model.parameters()],
        lrs=recorded(runner).lrs,
        metrics=recorded(runner).metrics,
        wrapper=type(runner.model).__name__,
    )


def separate(rank: int, folder: str) -> dict[str, Any]:
    runner = train(cfg(f"{folder}/straight", WORLD, **SEPARATE))
    with contextlib.suppress(Interrupted):
        train(cfg(f"{folder}/resumed", WORLD, **SEPARATE), Interrupt())
    again = train(cfg(f"{folder}/resumed", WORLD, resume=True, **SEPARATE))
    with runner.model.no_sync():
        syncs = [part.require_backward_grad_sync for part in list(runner.bare_model.children())[1:]]
    return dict(
        syncs=syncs,
        weights=[param.detach().clone() for param in runner.bare_model.parameters()],
        again=[param.detach().clone() for param in again.bare_model.parameters()],
        parts={name: type(part).__name__ for name, part in runner.bare_model.named_children()},
        names=list(torch.load(f"{folder}/straight/epoch_4.pth", weights_only=True)["state_dict"]),
        metrics=recorded(runner).metrics,
    )


def infinite(rank: int, folder: str) -> dict[str, Any]:
    runner = train(cfg(folder, WORLD, **iterations(WORLD)))
    return dict(weights=[param.detach().clone() for param in runner.bare_model.parameters()])


def buffers(rank: int, folder: str) -> dict[str, Any]:
    """Those of BatchNorm before and after each average, in training by epochs and by iterations."""
    seen: dict[str, list[torch.Tensor]] = dict(before=[], after=[])

    class Watch(Hook):
        def __init__(self, when: str):
            self.when = when

        def after_train_epoch(self, runner):
            seen[self.when].append(runner.bare_model.backbone[1].running_mean.clone())

        def before_val_epoch(self, runner):
            seen[self.when].append(runner.bare_model.backbone[1].running_mean.clone())

    hooks = [Watch("before"), dict(type="SyncBuffersHook"), Watch("after")]
    model = dict(type="PointNet", batch_norm=True)
    train(cfg(f"{folder}/epochs", WORLD, model=model, custom_hooks=hooks))
    train(cfg(f"{folder}/iterations", WORLD, model=model, custom_hooks=hooks, **iterations(WORLD)))
    return seen


def resumed(rank: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    straight = train(cfg(f"{folder}/straight", WORLD, **changes))
    with contextlib.suppress(Interrupted):
        train(cfg(f"{folder}/resumed", WORLD, **changes), Interrupt())
    torch.manual_seed(99)
    again = train(cfg(f"{folder}/resumed", WORLD, resume=True, **changes))
    return dict(straight=state_of(straight), resumed=state_of(again), trained=len(recorded(again).losses))


def wrong_model(rank: int, folder: str) -> dict[str, Any]:
    class NoBase(torch.nn.Linear):
        def train_step(self, data, optim_wrapper):
            return {}

    try:
        Runner.from_cfg(cfg(folder, WORLD, model=NoBase(2, 2)))
    except TypeError as error:
        return dict(message=str(error))
    return {}


def seedless(rank: int, folder: str) -> dict[str, Any]:
    runner = Runner.from_cfg(cfg(folder, WORLD, randomness={}))
    return dict(seed=runner.seed, timestamp=runner.timestamp, sampler=runner.train_dataloader.sampler.seed)


SCENARIOS: dict[str, tuple[Callable[..., dict[str, Any]], tuple]] = {
    "plain": (plain, ()),
    "separate": (separate, ()),
    "infinite": (infinite, ()),
    "buffers": (buffers, ()),
    "resumed": (resumed, (ACCUMULATE,)),
    "sharded": (resumed, (SHARDED,)),
    "wrong_model": (wrong_model, ()),
    "seedless": (seedless, ()),
}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    outcomes = {name: function(rank, f"{folder}/{name}", *rest) for name, (function, rest) in SCENARIOS.items()}
    torch.save(outcomes, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes have run every scenario."""
    folder: Path = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    result = subprocess.run(
        [*command, __file__, str(folder)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder / "stderr.txt").write_text(result.stderr)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each scenario gave in each process."""
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [outcome[name] for outcome in by_rank] for name in SCENARIOS}


@pytest.mark.parametrize(("scenario", "changes"), [("plain", {}), ("infinite", iterations(1))])
def test_two_processes_train_as_one_with_twice_the_batch(outcomes, tmp_path, scenario, changes):
    alone = train(cfg(tmp_path, 1, **changes))
    first, second = (outcome["weights"] for outcome in outcomes[scenario])
    assert all(map(torch.equal, first, second))
    for param, expected in zip(first, alone.model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, **TOLERANCE)


def test_parts_that_are_wrapped_separately_train_as_in_one_process(outcomes, tmp_path):
    alone = train(cfg(tmp_path, 1, **SEPARATE))
    first, second = outcomes["separate"]
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert all(map(torch.equal, first["weights"], first["again"]))
    for param, expected in zip(first["weights"], alone.model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, **TOLERANCE)
    assert first["syncs"] == [False, False]
    assert first["parts"] == dict(
        data_preprocessor="BaseDataPreprocessor", backbone="DistributedDataParallel", head="DistributedDataParallel"
    )
    assert first["names"] == list(alone.model.state_dict()) and first["metrics"] == recorded(alone).metrics


def test_both_have_the_learning_rates_and_the_metrics_of_the_whole(outcomes, tmp_path):
    alone = recorded(train(cfg(tmp_path, 1)))
    for outcome in outcomes["plain"]:
        assert outcome["lrs"] == alone.lrs and outcome["wrapper"] == "MMDistributedDataParallel"
        assert [metrics["count"] for metrics in outcome["metrics"]] == [21] * 4, "what was loaded twice counts once"
        assert outcome["metrics"] == alone.metrics


def test_torch_does_not_warn_of_arguments_that_the_user_has_not_given(folder):
    assert "broadcast_buffers" not in (folder / "stderr.txt").read_text()


def test_one_process_writes(outcomes, folder):
    names = sorted(re.sub(r"\d{8}_\d{6}", "TIME", path.name) for path in (folder / "plain").iterdir())
    assert names == ["epoch_1.pth", "epoch_2.pth", "epoch_3.pth", "epoch_4.pth", "last_checkpoint", "vis_data"]
    lines = (folder / "plain" / "vis_data" / "scalars.json").read_text().splitlines()
    assert len(lines) == 4 * 2 + 4


def test_buffers_are_averaged(outcomes):
    first, second = outcomes["buffers"]
    assert len(first["after"]) == 4 + 4 + 4 + 1  # after each epoch, before each validation, and after "the" epoch
    for index, (one, other) in enumerate(zip(first["before"], second["before"], strict=True)):
        averaged = first["after"][index]
        assert torch.equal(averaged, second["after"][index])
        torch.testing.assert_close(averaged, (one + other) / 2)
    assert not torch.equal(first["before"][0], second["before"][0])


@pytest.mark.parametrize("scenario", ["resumed", "sharded"])
def test_a_resumed_training_is_the_uninterrupted_one_in_every_process(outcomes, scenario):
    for outcome in outcomes[scenario]:
        assert 0 < outcome["trained"] < 20
        assert_same(outcome["resumed"], outcome["straight"])
    if scenario == "resumed":
        one, other = (outcome["straight"]["random"] for outcome in outcomes[scenario])
        assert not torch.equal(one, other), "each process draws numbers of its own"


def test_one_process_resumes_what_two_began(outcomes, folder, tmp_path, capsys):
    path = folder / "plain" / "epoch_2.pth"
    runner = train(cfg(tmp_path, 1, resume=True, load_from=str(path)))
    assert min(recorded(runner).losses) == 10
    assert "was written by 2 processes and is resumed by 1" in capsys.readouterr().out


def test_a_model_that_would_bypass_the_averaging_is_refused(outcomes):
    for outcome in outcomes["wrong_model"]:
        assert (
            "several processes can only train a BaseModel" in outcome["message"]
            and "NoBase is not one" in outcome["message"]
        )


def test_a_random_seed_is_one_for_all(outcomes):
    assert outcomes["seedless"][0] == outcomes["seedless"][1]


def test_other_threads_finish_before_the_interpreter_ends(monkeypatch):
    """As gloo's do, which abort the process if they ask for Python's lock while it ends."""
    monkeypatch.setattr(distributed, "_running", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    woken, finished = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: woken.wait() and finished.set())
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody gets the lock unless this thread lets go of it
    try:
        woken.set()
        distributed._leave()
        assert finished.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize("sampler", [DefaultSampler, InfiniteSampler])
@pytest.mark.parametrize("size", [10, 11])
def test_samplers_share_the_data_out(monkeypatch, sampler, size):
    shares = []
    for rank in range(3):
        monkeypatch.setattr("fusedopt.training.engine.data.rank", lambda rank=rank: rank)
        monkeypatch.setattr("fusedopt.training.engine.data.world_size", lambda: 3)
        one = sampler(range(size), seed=1)
        shares.append([index for index, _ in zip(one, range(4), strict=False)])
        one.skip_samples(2)
        assert [index for index, _ in zip(one, range(2), strict=False)] == shares[-1][2:]
    alone = [index for group in zip(*shares, strict=True) for index in group]
    assert sorted(set(alone[:size])) == list(range(size))


def test_results_come_in_the_order_of_the_data(monkeypatch):
    class Keep(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.extend(data_samples)

        def compute_metrics(self, results):
            return dict(results=results)

    monkeypatch.setattr("fusedopt.training.engine.evaluator.gather", lambda mine: [[0, 2, 4], [1, 3, 0]])
    assert Keep(prefix="all").evaluate(5) == {"all/results": [0, 1, 2, 3, 4]}


if __name__ == "__main__":
    main(sys.argv[1])
