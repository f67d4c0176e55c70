"""Checkpoints that were edited, or that do not fit: refused before anything is loaded."""

from __future__ import annotations

import re

import pytest
import torch
from engine_cases import PointNet, assert_refused, assert_same, config, foreign, train

from fusedopt.training.engine import Runner


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("by_epoch", "x", "meta['by_epoch'] is 'x'; expected True or False"),
        ("epoch", -1, "meta['epoch'] is -1; expected a whole number of at least 0"),
        ("iter", True, "meta['iter'] is True; expected a whole number"),
        ("seed", [1], "meta['seed'] is a list; expected a whole number"),
        ("position", dict(passes=-5, batches=0), "meta['position']['passes'] is -5; expected"),
        ("position", dict(passes=torch.ones(1).expand((7,) * 20), batches=0), "['passes'] is a Tensor; expected"),
        ("optimizers", 5, "meta['optimizers'] is 5; expected a dict"),
        ("optimizers", {"": "x\n\x1b[2J"}, "is from other optimizers: {'': 'x\\n\\x1b[2J'} instead of"),
    ],
)
def test_an_edited_meta_changes_nothing(tmp_path, key, value, message):
    path = foreign(tmp_path)
    checkpoint = torch.load(path)
    checkpoint["meta"][key] = value
    torch.save(checkpoint, path)
    assert_refused(tmp_path, re.escape(message))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("gradients", {"head.bias": 5}, "gradients['head.bias'] has a int instead of shape (3,)"),
        ("gradients", {"head.bias": torch.ones(4)}, "gradients['head.bias'] has shape (4,) instead of shape (3,)"),
        ("buffers", {"head.bias": torch.ones(2)}, "buffers['head.bias'] has shape (2,) instead"),
        (
            "random",
            {"python": (1, 2), "torch": torch.ones(2)},
            "the states of random generators in 'random' are not",
        ),
        ("pass_random", {"python": (3, [1], None)}, "the states of random generators in 'pass_random' are not"),
    ],
)
def test_an_edited_process_changes_nothing(tmp_path, part, value, message):
    path = foreign(tmp_path)
    checkpoint = torch.load(path)
    checkpoint["processes"][0][part] = value
    torch.save(checkpoint, path)
    assert_refused(tmp_path, re.escape(message))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3).to_sparse(), "head.bias is torch.sparse_coo instead of torch.strided"),
        (torch.ones(3, dtype=torch.complex64), "head.bias is torch.complex64 instead of torch.float32"),
        (
            torch.ones(12, dtype=torch.uint8).view(torch.bits8)[:3],
            "head.bias is torch.bits8 instead of torch.float32",
        ),
    ],
)
def test_weights_that_cannot_be_copied(tmp_path, value, message):
    path = foreign(tmp_path)
    checkpoint = torch.load(path)
    checkpoint["state_dict"]["head.bias"] = value
    torch.save(checkpoint, path)
    assert_refused(tmp_path, re.escape(f"does not fit the model: {message}"))
    loaded = Runner.from_cfg(config(tmp_path))
    before = loaded.model.head.bias.clone()
    loaded.load_checkpoint(path)
    assert torch.equal(loaded.model.head.bias, before)


def test_a_model_with_a_child_called_module(tmp_path):
    class Outer(PointNet):
        def __init__(self):
            super().__init__()
            self.module, self.backbone = self.backbone, torch.nn.Identity()

        def forward(self, inputs, labels, mode="tensor"):
            return super().forward(self.module(inputs), labels, mode)

    cfg = config(tmp_path, model=Outer(), train_cfg=dict(by_epoch=True, max_epochs=2))
    done = train(cfg)
    again = Runner.from_cfg({**config(tmp_path, model=Outer()), "resume": True, "log_level": "ERROR"})
    again.load_or_resume()
    assert_same(dict(again.model.state_dict()), dict(done.model.state_dict()))


def test_what_torch_obeys_beside_versions_is_not_read(tmp_path):
    donor = PointNet().double()
    weights = donor.state_dict()
    for about in weights._metadata.values():
        about["assign_to_params_buffers"] = True
    torch.save(weights, tmp_path / "file.pth")
    loaded = Runner.from_cfg(config(tmp_path / "out"))
    before = list(loaded.model.parameters())
    loaded.load_checkpoint(tmp_path / "file.pth")
    for param, old, value in zip(loaded.model.parameters(), before, weights.values(), strict=True):
        assert param is old and param.dtype == torch.float32 and torch.equal(param, value.float())
