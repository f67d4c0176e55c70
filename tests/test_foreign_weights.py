"""load_from and convert: weights from the files of other trainers, and what is said about the rest of them."""

from __future__ import annotations

import argparse
import datetime
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import PointNet, config
from torch import nn

from fusedopt.cli import main
from fusedopt.training.engine import CheckpointError, Runner
from fusedopt.training.reading import find_weights, read_file


def donor() -> PointNet:
    torch.manual_seed(7)
    return PointNet(batch_norm=True)


def runner(folder: Path, **changes: Any) -> Runner:
    return Runner.from_cfg(config(folder, model=dict(type="PointNet", batch_norm=True), log_level="INFO", **changes))


def of_class(module: str, name: str, base: type, *arguments: Any) -> Any:
    """An object of a class that whoever reads the file does not have."""
    made = type(name, (base,), {"__module__": module})
    sys.modules[module] = types.ModuleType(module)
    setattr(sys.modules[module], name, made)
    return made(*arguments)


def lightning(weights: Any) -> dict[str, Any]:
    settings = of_class("lightning_like", "AttributeDict", dict, dict(lr=0.1))
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict((f"net.{name}", value) for name, value in weights.items()),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "hyper_parameters": settings,
    }


def timm(weights: Any) -> dict[str, Any]:
    arguments = argparse.Namespace(model="resnet18", lr=0.1, started=datetime.datetime(2026, 1, 2))
    return {
        "epoch": 3,
        "arch": "net",
        "state_dict": weights,
        "args": arguments,
        "version": 2,
        "metric": np.float64(77.1),
    }


def prefixed(prefix: str, weights: Any) -> OrderedDict[str, Any]:
    return OrderedDict((prefix + name, value) for name, value in weights.items())


#: What is saved, and what the log says about it.
FILES = {
    "a state dict": (lambda weights: weights, "9 weights"),
    "under model": (lambda weights: {"model": weights, "step": 5}, "9 weights from its 'model'; left out: step"),
    "DataParallel": (lambda weights: prefixed("module.", weights), "9 weights"),
    "torch.compile": (lambda weights: {"state_dict": prefixed("_orig_mod.", weights)}, "9 weights from its 'state_"),
    "compiled in DataParallel": (lambda weights: prefixed("module._orig_mod.", weights), "9 weights"),
    "DeepSpeed": (lambda weights: {"module": prefixed("module.", weights)}, "9 weights from its 'module'"),
    "Lightning": (lightning, "loops, callbacks, hyper_parameters, objects of lightning_like.AttributeDict"),
    "timm": (timm, "left out: epoch, arch, args, version, metric, objects of argparse.Namespace, datetime.datetime"),
    "a part of a larger model": (
        lambda weights: prefixed("detector.backbone.", weights) | {"detector.head.weight": torch.ones(3)},
        "9 of 10 weights",
    ),
    "another class of dict": (
        lambda weights: {"state_dict": of_class("dicts_like", "Weights", dict, weights)},
        "objects of dicts_like.Weights",
    ),
}  # fmt: skip


def assert_loaded(model: nn.Module) -> None:
    for (name, value), expected in zip(model.state_dict().items(), donor().state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kind", FILES)
def test_load_from(kind, new, tmp_path, capsys):
    make, told = FILES[kind]
    torch.save(make(donor().state_dict()), tmp_path / "file.pth", _use_new_zipfile_serialization=new)
    for module in ("lightning_like", "dicts_like"):
        sys.modules.pop(module, None)
    loaded = runner(tmp_path / "out", load_from=tmp_path / "file.pth")
    loaded.load_or_resume()
    assert_loaded(loaded.model)
    log = capsys.readouterr().out
    assert f"Loaded {tmp_path / 'file.pth'}: " in log and told in log


def test_a_model_that_was_saved_as_an_object(tmp_path, capsys):
    model = donor()
    model.backbone[0].register_buffer("passing", torch.ones(1), persistent=False)
    torch.save({"model": model, "ema": None}, tmp_path / "file.pth")
    loaded = runner(tmp_path / "out", load_from=tmp_path / "file.pth")
    loaded.load_or_resume()
    assert_loaded(loaded.model)
    assert "9 weights from its 'model'; left out: ema, objects of" in capsys.readouterr().out


def test_safetensors(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(prefixed("module.", donor().state_dict()), tmp_path / "model.safetensors")
    loaded = runner(tmp_path / "out", load_from=tmp_path / "model.safetensors")
    loaded.load_or_resume()
    assert_loaded(loaded.model)


def test_a_prefix_is_removed_and_said(tmp_path, capsys):
    torch.save(prefixed("student.", donor().state_dict()), tmp_path / "file.pth")
    runner(tmp_path / "out", load_from=tmp_path / "file.pth").load_or_resume()
    assert "file.pth: the prefix 'student.' of the weights' names is removed" in capsys.readouterr().out


def test_two_prefixes_are_refused(tmp_path):
    weights = donor().state_dict()
    torch.save(prefixed("student.", weights) | prefixed("teacher.", weights), tmp_path / "file.pth")
    loaded = runner(tmp_path / "out", load_from=tmp_path / "file.pth")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"names fit without 'student\.', and as well without 'teacher\.'"):
        loaded.load_or_resume()
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_two_sets_of_names_do_not_become_one(tmp_path, capsys):
    weights = donor().state_dict()
    others = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({**weights, **prefixed("module.", others)}, tmp_path / "file.pth")
    loaded = runner(tmp_path / "out", load_from=tmp_path / "file.pth")
    loaded.load_or_resume()
    assert_loaded(loaded.model)
    log = capsys.readouterr().out
    assert "it has module.backbone.0.weight" in log and "9 of 18 weights" in log


@pytest.mark.parametrize("names", [["head.bias"], ["head.bias", "head.weight", "backbone.0.bias"]])
def test_a_few_names_that_fit_are_no_prefix(names, tmp_path):
    weights = donor().state_dict()
    torch.save({f"other.{name}": weights[name] for name in names}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="does not fit the model: it lacks"):
        runner(tmp_path / "out", load_from=tmp_path / "file.pth").load_or_resume()


def test_a_name_that_fits_by_accident_does_not_hide_the_prefix(tmp_path):
    weights = donor().state_dict()
    accident = {"head.bias": torch.zeros(3)}
    torch.save({**accident, **prefixed("net.", weights)}, tmp_path / "file.pth")
    loaded = runner(tmp_path / "out", load_from=tmp_path / "file.pth")
    loaded.load_or_resume()
    assert_loaded(loaded.model)


def test_parts_of_a_model_that_are_no_modules_are_named(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), torch.fx.symbolic_trace(nn.Linear(2, 2)))
    torch.save(model, tmp_path / "file.pth")
    found = find_weights(read_file(tmp_path / "file.pth"))
    assert list(found.state_dict) == ["0.weight", "0.bias"]
    assert "left out: 1 (torch.fx.graph_module.reduce_graph_module)" in found.told()


def test_names_that_become_the_same_text(tmp_path):
    torch.save({1: torch.ones(1), "1": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth has no weights that can be told apart"):
        find_weights(read_file(tmp_path / "file.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "has no weights: it holds a list, and no tensors at its top or under 'state_dict', 'model'"),
        ({"a": 1, "b": {"c": 2}}, "has no weights: it holds a dict with a, b, and"),
        (argparse.Namespace(a=1), "has no weights: it holds a argparse.Namespace, and"),
        ({"other.weight": torch.ones(2)}, "does not fit the model: it lacks backbone.0.weight"),
        ({"state_dict": argparse.Namespace(a=1)}, "has no weights: it holds a dict with state_dict"),
    ],
)
def test_no_weights(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message):
        runner(tmp_path / "out", load_from=tmp_path / "file.pth").load_or_resume()


def test_hooks_see_the_checkpoint_and_no_object_of_it(tmp_path):
    torch.save({"state_dict": donor().state_dict(), "meta": {"args": argparse.Namespace(a=1)}}, tmp_path / "file.pth")
    checkpoint = runner(tmp_path / "out").load_checkpoint(tmp_path / "file.pth")
    assert repr(checkpoint["meta"]) == "{'args': <argparse.Namespace, not built>}"


def test_an_old_text_of_a_config_imports_nothing(tmp_path):
    """The settings of a checkpoint that did not note them come from the text of its config."""
    from fusedopt.training.engine.settings import settings_of_text

    (tmp_path / "trap_of_a_config.py").write_text("raise SystemError('imported')")
    text = "train_cfg = dict(max_epochs=2)\noptim_wrapper = dict(optimizer=dict(type={!r}, lr=0.1))\n"
    meta = dict(by_epoch=True, epoch_length=5)
    assert settings_of_text(text.format("AdamW"), meta)["optim_wrapper.optimizer.lr"] == 0.1
    sys.path.insert(0, str(tmp_path))
    try:
        assert settings_of_text(text.format("trap_of_a_config.Adam"), meta) is None
    finally:
        sys.path.remove(str(tmp_path))


class TestConvert:
    def run(self, capsys, *arguments: Any) -> tuple[int, str]:
        code = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        assert (captured.out if code else captured.err) == ""
        return code, captured.err if code else captured.out

    @pytest.mark.parametrize("kind", FILES)
    def test_what_it_writes_is_read_with_weights_only(self, kind, tmp_path, capsys):
        make, _ = FILES[kind]
        torch.save(make(donor().state_dict()), tmp_path / "file.pth")
        code, told = self.run(capsys, tmp_path / "file.pth", tmp_path / "out.pth")
        assert code == 0 and told.startswith(f"{tmp_path / 'out.pth'}: ") and told.count("\n") == 1
        written = torch.load(tmp_path / "out.pth", weights_only=True)
        assert not any(part in ("module", "_orig_mod") for name in written for part in name.split("."))
        if kind not in ("Lightning", "a part of a larger model"):
            model = PointNet(batch_norm=True)
            model.load_state_dict(written)
            assert_loaded(model)
            assert written._metadata if kind == "a state dict" else True

    def test_a_model_and_shared_weights(self, tmp_path, capsys):
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        model = nn.ModuleDict(dict(a=nn.Linear(2, 2), b=nn.Linear(2, 2)))
        model["b"].weight = model["a"].weight
        torch.save(nn.DataParallel(model), tmp_path / "file.pth")
        for out in ("out.pth", "out.safetensors"):
            assert self.run(capsys, tmp_path / "file.pth", tmp_path / out)[0] == 0
        written = torch.load(tmp_path / "out.pth", weights_only=True)
        assert written["a.weight"].data_ptr() == written["b.weight"].data_ptr()
        assert not any(value.requires_grad for value in written.values())
        for read in (written, safetensors.load_file(tmp_path / "out.safetensors")):
            assert sorted(read) == sorted(model.state_dict())
            assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())

    def test_names_that_would_become_the_same_stay(self, tmp_path, capsys):
        torch.save({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.zeros(1)}, tmp_path / "file.pth")
        self.run(capsys, tmp_path / "file.pth", tmp_path / "out.pth")
        assert list(torch.load(tmp_path / "out.pth", weights_only=True)) == ["a.weight", "_orig_mod.a.weight"]

    def test_mistakes(self, tmp_path, capsys):
        torch.save({"w": torch.ones(1), "note": "text"}, tmp_path / "file.pth")
        (tmp_path / "text.pth").write_text("text")
        torch.save({"w": torch.ones(2).to_sparse()}, tmp_path / "sparse.pth")
        torch.save({"\ud800": torch.ones(2)}, tmp_path / "name.pth")
        torch.save({"w": torch.ones(1).expand((2,) * 40)}, tmp_path / "large.pth")
        (tmp_path / "folder").mkdir()
        for arguments, message in (
            (("file.pth", "file.pth"), "is the checkpoint itself; give OUT another name"),
            (("nowhere.pth", "out.pth"), "there is no such checkpoint"),
            (("text.pth", "out.pth"), "neither a file of torch.save nor of safetensors"),
            (("file.pth", "folder"), "cannot be written"),
            (("file.pth", "out.safetensors"), "safetensors hold only tensors, but there is note"),
            (("sparse.pth", "out.safetensors"), "cannot be written as safetensors: "),
            (("name.pth", "out.safetensors"), "cannot be written as safetensors: "),
            (("large.pth", "out.safetensors"), "safetensors hold every element, and w repeat one"),
        ):
            code, told = self.run(capsys, *(tmp_path / name for name in arguments))
            assert code == 2 and message in told and told.startswith("fusedopt: ") and told.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {
            *(f"{name}.pth" for name in ("file", "text", "sparse", "name", "large")),
            "folder",
        }
