"""Training in each precision, in small: what is rounded by chance keeps moving, and ends where float32 does.

``python -m benchmarks.precision`` does the same with larger models, and docs/precision.md has its figures.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fusedopt
from fusedopt.rules import codes
from fusedopt.rules.codes import join

pytest.importorskip("sklearn", reason="the digits: scikit-learn is missing")

from benchmarks import precision
from benchmarks.precision import CHANCE, COPIED, EXACT, FLOAT32, VARIANTS, final_loss, train
from benchmarks.precision_tasks import TASKS, Task
from examples.digits.data import load_digits

BY_NAME = {variant.name: variant for variant in VARIANTS}
SEEDS = range(2)
STEPS = 200


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10))


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    return load_digits()[0]


def digits_loss(model: nn.Module, generator: torch.Generator, batch: int) -> torch.Tensor:
    images, labels = digits()
    index = torch.randint(len(labels), (batch,), generator=generator)
    logits = model(images[index].to(next(model.parameters()).dtype))
    return functional.cross_entropy(logits.float(), labels[index])


TASK = Task("a perceptron", perceptron, digits_loss, fusedopt.FusedAdamW, {"lr": 2e-3}, batch=32, steps=STEPS)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def ended(name: str) -> list[float]:
    """The final loss of each seed."""
    return [final_loss(train(TASK, BY_NAME[name], seed, STEPS)[0]) for seed in SEEDS]


class TestMoments:
    """With beta2 = 0.999 a mean of squares falls by at most a thousandth in a step: under half an ulp of bfloat16."""

    def second_moment(self, steps: int, **settings: Any) -> torch.Tensor:
        """Of gradients that were 1 once and 0.5 from then on."""
        param = nn.Parameter(torch.zeros(4096))
        optimizer = fusedopt.FusedAdamW([param], lr=1e-6, betas=(0.9, 0.0), backend="native", **settings)
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        param.grad.fill_(0.5)
        for _ in range(steps):
            optimizer.step()
        state = optimizer.state[param]
        if "exp_avg_sq_codes" in state:
            return codes.decode(state["exp_avg_sq_codes"], "int8_unsigned", param.numel())
        return state["exp_avg_sq"].float()

    def test_to_nearest_it_stands_still(self) -> None:
        assert (self.second_moment(1000, state_dtype="bfloat16") == 1).all()

    @pytest.mark.parametrize("settings", [{"state_dtype": "bfloat16", **CHANCE}, {"state_dtype": "int8"}])
    def test_by_chance_it_falls_as_it_should(self, settings: dict[str, Any]) -> None:
        exact = self.second_moment(1000)
        assert exact.unique().numel() == 1 and 0.52 < exact[0] < 0.53, "0.25 + 0.75 / e"
        kept = self.second_moment(1000, **settings)
        assert abs(kept.mean() / exact[0] - 1) < 0.01
        assert kept.std() / exact[0] < 0.15

    def test_in_8_bits_it_makes_updates_a_little_larger(self) -> None:
        """Its mean is right, but 1 / sqrt(v) of a v that scatters is larger on average: about 3 / 8 of its variance."""
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.zeros(2**14)) for _ in range(2)]
        kept = ({}, {"state_dtype": {"exp_avg_sq": "int8"}})
        exact, coded = (
            fusedopt.FusedAdamW([param], lr=1e-6, backend="native", **settings)
            for param, settings in zip(params, kept, strict=True)
        )
        for _ in range(500):
            params[0].grad = params[1].grad = torch.randn(2**14, generator=generator)
            exact.step()
            coded.step()
        expected = exact.state[params[0]]["exp_avg_sq"]
        found = codes.decode(coded.state[params[1]]["exp_avg_sq_codes"], "int8_unsigned", 2**14)
        assert abs(found.mean() / expected.mean() - 1) < 0.003
        assert 1.005 < (expected / found).sqrt().mean() < 1.02


class TestWeights:
    """The next bfloat16 below 1 is 1/256 away; an update of 1e-3 is a quarter of that."""

    def moved(self, **settings: Any) -> torch.Tensor:
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = fusedopt.FusedAdamW([param], lr=1e-3, weight_decay=0.0, backend="native", **settings)
        param.grad = torch.ones_like(param)
        for _ in range(50):
            optimizer.step()
        state = optimizer.state[param]
        if "master_low" in state:
            return join(param.detach(), state["master_low"])
        return state.get("master", param.detach().float())

    def test_to_nearest_they_stand_still(self) -> None:
        assert (self.moved(**EXACT) == 1).all()

    @pytest.mark.parametrize("settings", [{"master": "float32"}, {"master": "split"}, {"master": "split8"}, CHANCE])
    def test_with_more_bits_or_by_chance_they_move(self, settings: dict[str, Any]) -> None:
        assert self.moved(**EXACT, **settings).mean() == pytest.approx(0.95, abs=1e-3)


class TestSplit:
    def test_it_has_the_bits_of_float32_training(self) -> None:
        """Of one whose model holds the float32 weights rounded to nearest, ties away from zero, after each step."""
        torch.manual_seed(0)
        model = perceptron().bfloat16()
        other = perceptron().bfloat16()
        other.load_state_dict(model.state_dict())
        exact = [nn.Parameter(param.detach().float()) for param in other.parameters()]
        mine = fusedopt.FusedAdamW(model.parameters(), lr=1e-3, backend="native", master="split", **EXACT)
        theirs = fusedopt.FusedAdamW(exact, lr=1e-3, backend="native")
        batches = [torch.Generator().manual_seed(0) for _ in range(2)]
        ties = 0
        for _ in range(100):
            for each, generator in zip((model, other), batches, strict=True):
                each.zero_grad()
                digits_loss(each, generator, 32).backward()
            mine.step()
            for own, param in zip(exact, other.parameters(), strict=True):
                own.grad = param.grad.float()
            theirs.step()
            for own, param, split in zip(exact, other.parameters(), model.parameters(), strict=True):
                bits = own.detach().view(torch.int32)
                param.data = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
                ties += int((param != own.bfloat16()).sum())
                assert torch.equal(param, split)
                assert torch.equal(join(split.detach(), mine.state[split]["master_low"]), own.detach())
        assert ties < 20, "which are all that rounds in another way than master='float32' does"

    def test_a_float32_master_has_them_ties_too(self) -> None:
        losses, params = train(TASK, BY_NAME["master float32"], 0, 100)
        expected, others = train(TASK, BY_NAME[COPIED], 0, 100)
        assert losses == expected
        assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


class TestTraining:
    """How far final losses are from those of float32 with the same batches."""

    @pytest.mark.parametrize(
        ("name", "most"),
        [
            ("bf16 states, nearest", 0.002),
            ("bf16 states, by chance", 0.001),
            ("float16 states, nearest", 0.002),
            ("float16 states, by chance", 0.001),
            ("int8 states", 0.01),
            ("master split", 0.001),
            ("master split, bf16 states, by chance", 0.001),
            ("master split, int8 states", 0.01),
            ("master split8, int8 states", 0.01),
            ("no master, by chance, bf16 states", 0.01),
        ],
    )
    def test_it_ends_as_float32_does(self, name: str, most: float) -> None:
        """``most``: of the final loss; about twice what was seen."""
        for loss, expected in zip(ended(name), ended(precision.REFERENCES[BY_NAME[name].half]), strict=True):
            assert abs(loss / expected - 1) < most

    @pytest.mark.parametrize(
        "name", ["no master, nearest, float32 states", "no master, nearest, bf16 states (as torch)"]
    )
    def test_bf16_parameters_to_nearest_end_worse(self, name: str) -> None:
        for loss, expected in zip(ended(name), ended(COPIED), strict=True):
            assert loss > 1.1 * expected


class TestMeasurement:
    """What benchmarks/precision.py makes of the losses."""

    def content(self) -> dict[str, Any]:
        names = {FLOAT32: 0.0, f"{FLOAT32}, moved": 0.01, "int8 states": 0.02, "bf16 states, nearest": -0.004}
        runs = [
            {"variant": name, "seed": seed, "final": 1 + seed + apart, "difference": apart, "curve": [2.0, 1.0 + apart]}
            for name, apart in names.items()
            for seed in range(4)
        ]
        task = TASKS["vit"]
        about = {"about": task.about, "optimizer": task.optimizer.__name__, "settings": task.settings}
        return {**about, "task": "vit", "parameters": 1, "steps": 2, "batch": 3, "runs": runs}

    def test_differences_are_in_units_of_the_noise(self) -> None:
        content = self.content()
        assert precision.noise(content, half=False) == pytest.approx(0.01)
        assert precision.spread(content, half=False) == pytest.approx(1.2909944)
        rows = {line.split("|")[1].strip(): line for line in precision.table(content).splitlines()}
        assert "| +2 +2 +2 +2 " in rows["int8 states"] and "higher" in rows["int8 states"]
        assert "-0.4" in rows["bf16 states, nearest"] and "within the noise" in rows["bf16 states, nearest"]
        assert "noise: 0.01; seeds: 1.3" in rows[FLOAT32]
        assert precision.in_units([1.0, 0.0, -2.0], 0.0) == [float("inf"), 0.0, float("-inf")]

    def test_a_weight_is_moved_by_one_ulp(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            params = list(perceptron().to(dtype).parameters())
            before = [param.detach().clone() for param in params]
            precision.move(params, 0)
            changed = torch.cat([(one - other).abs().flatten() for one, other in zip(params, before, strict=True)])
            assert (changed > 0).sum() == 1
            assert changed.max() <= torch.finfo(dtype).eps

    def test_pictures_are_drawn_from_the_figures(self, tmp_path: Path) -> None:
        figures = pytest.importorskip("benchmarks.precision_figures", reason="matplotlib is missing")
        figures.draw({"tasks": [self.content()]}, tmp_path, "from here")
        for name in figures.PICTURES:
            content = (tmp_path / name).read_bytes()
            assert content[:4] == b"\x89PNG" and b"from here" in content
