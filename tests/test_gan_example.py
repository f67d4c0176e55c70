"""The GAN example: two networks that take turns, each with a wrapper of its own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt import FusedAdam, OptimWrapperDict, build_optim_wrapper
from fusedopt.training.engine import Config, Runner
from fusedopt.training.registry import MODELS

REPOSITORY = Path(__file__).resolve().parent.parent
for needed, name in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
    pytest.importorskip(needed, reason=f"{name} is not installed: pip install 'fusedopt[demo]'")

CONFIG = Config.fromfile(REPOSITORY / "configs" / "gan_digits.py")


def build(discriminator_steps: int, generator_steps: int, **counts: int):
    torch.manual_seed(0)
    model = MODELS.build(
        {**CONFIG["model"], "discriminator_steps": discriminator_steps, "generator_steps": generator_steps}
    )
    cfg = CONFIG["optim_wrapper"].copy()
    for name, count in counts.items():
        cfg[name]["accumulative_counts"] = count
    return model, build_optim_wrapper(model, cfg)


def bits(network: torch.nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in network.parameters()]


def changes(network: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return not all(map(torch.equal, network.parameters(), before))


@pytest.mark.parametrize(
    ("steps", "counts", "discriminator", "generator"),
    [
        # After how many batches each network has changed, and by how many steps of the generator at a time.
        ((1, 1), (1, 1), [1, 2, 3, 4, 5, 6], {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}),
        ((2, 1), (1, 1), [1, 2, 3, 4, 5, 6], {2: 1, 4: 1, 6: 1}),
        ((1, 2), (3, 1), [3, 6], {3: 2, 6: 2}),
        ((1, 1), (2, 4), [2, 4, 6], {2: 1, 4: 1, 6: 1}),
        ((3, 2), (2, 3), [2, 4, 6], {6: 2}),
    ],
)
def test_the_networks_take_turns(steps, counts, discriminator, generator):
    model, wrappers = build(*steps, discriminator=counts[0], generator=counts[1])
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    seen: tuple[list, dict] = ([], {})
    for iteration in range(6):
        before = bits(model.discriminator), bits(model.generator), wrappers["generator"].step_count
        losses = model.train_step({"inputs": images}, wrappers)
        if changes(model.discriminator, before[0]):
            seen[0].append(iteration + 1)
        if changes(model.generator, before[1]):
            seen[1][iteration + 1] = wrappers["generator"].step_count - before[2]
        assert ("loss_generator" in losses) == (iteration + 1 in generator)
    assert seen == (discriminator, generator)
    assert wrappers["discriminator"].inner_count == 6
    # It is told anew, each time, how many iterations it gets.
    assert wrappers["generator"].inner_count == wrappers["generator"]._max_counts == steps[1] * counts[1]


def test_the_generators_turn_leaves_no_gradient_in_the_discriminator():
    model, wrappers = build(1, 1, discriminator=1)
    model.train_step({"inputs": torch.zeros(4, 1, 8, 8)}, wrappers)
    assert all(param.grad is None and param.requires_grad for param in model.discriminator.parameters())


def test_the_config_gives_each_network_a_fused_optimizer_of_its_own():
    model, wrappers = build(1, 1)
    assert type(wrappers) is OptimWrapperDict and list(wrappers) == ["generator", "discriminator"]
    assert all(type(wrapper.optimizer) is FusedAdam for wrapper in wrappers.values())
    trained = [
        param for wrapper in wrappers.values() for group in wrapper.optimizer.param_groups for param in group["params"]
    ]
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_training_knows_whose_turn_it_is(tmp_path, stop):
    def train(iterations: int, resume: bool = False) -> torch.nn.Module:
        config = CONFIG.copy()
        config.train_cfg = dict(by_epoch=False, max_iters=iterations)
        config.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=stop)
        config.update(work_dir=str(tmp_path / str(iterations)), resume=resume, log_level="ERROR")
        if resume:
            config.load_from = str(tmp_path / str(stop) / f"iter_{stop}.pth")
        return Runner.from_cfg(config).train()

    train(stop)
    expected, resumed = train(10), train(10, resume=True)
    assert int(resumed.batches) == 10
    assert all(map(torch.equal, resumed.state_dict().values(), expected.state_dict().values()))


@pytest.mark.slow
def test_a_short_training_saves_a_picture(tmp_path):
    command = [sys.executable, "examples/gan_digits.py", "--epochs", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "89 iterations in" in result.stdout
    assert "44 steps of the discriminator, 22 of the generator" in result.stdout
    assert (tmp_path / "epoch_1.pth").is_file()
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py: cannot read the config file"),
        (["--epochs", "0"], "train_cfg: Invalid train_cfg.max_epochs: 0"),
        ([str(REPOSITORY / "configs" / "digits_resnet.py")], "this config does not train a DigitsGAN"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gan_digits.py", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPOSITORY / "examples" / "gan_digits.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
