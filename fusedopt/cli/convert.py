"""``fusedopt convert``."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages import one_line, require, some
from ..messages.wrapping import bare_name
from .arguments import UsageError, common, examples

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "convert",
        parents=[common()],
        help="write only the weights of a checkpoint, for torch.load(weights_only=True)",
        description="Write only the weights of a checkpoint, as a state dict that torch.load(weights_only=True) reads, "
        "or as safetensors. Nothing in the checkpoint is run. Prefixes of DataParallel and torch.compile are removed.",
        epilog=examples(
            "fusedopt convert last.pth.tar weights.pth",
            "fusedopt convert work_dirs/digits_vit/epoch_10.pth weights.safetensors",
        ),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="file of torch.save or safetensors, such as a checkpoint of MMEngine or Lightning, or a sharded "
        "checkpoint, which is a folder",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write: .safetensors, or any other name")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from ..training.engine.checkpoint import is_folder, write_checkpoint
    from ..training.engine.sharded_checkpoint import read_folder
    from ..training.reading import Contents, find_weights, read_file

    checkpoint, out = arguments.checkpoint, arguments.out
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UsageError(f"{one_line(out)} is the checkpoint itself; give OUT another name")
    if is_folder(checkpoint):
        weights = find_weights(Contents(checkpoint, read_folder(checkpoint, keys=("state_dict",))))
    else:
        weights = find_weights(read_file(checkpoint))
    state_dict = _bare(weights.state_dict)
    if out.suffix == ".safetensors":
        _write_safetensors(state_dict, out)
    else:
        write_checkpoint(state_dict, out)
    print(f"{one_line(out)}: {weights.told()}")
    return 0


def _write_safetensors(state_dict: Mapping[str, Any], out: Path) -> None:
    from ..training.engine.checkpoint import write_atomically

    others = [name for name, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise UsageError(f"{out}: safetensors hold only tensors, but there is {some(others)}")
    dense = {name: value for name, value in state_dict.items() if value.layout == torch.strided}
    larger = [name for name, value in dense.items() if value.numel() > 1024 * value.untyped_storage().nbytes()]
    if larger:
        raise UsageError(f"{out}: safetensors hold every element, and {some(larger)} repeat one; write another format")
    safetensors = require("safetensors.torch", "engine")
    try:
        # Copies, because tensors that share memory cannot be written.
        copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state_dict.items()}
        content = safetensors.save(copies, {"format": "pt"})
    except Exception as error:  # whatever it raises for layouts, dtypes and names
        reason = one_line(error, 200)
        raise UsageError(f"{out}: cannot be written as safetensors: {type(error).__name__}: {reason}") from error
    write_atomically(out, lambda file: file.write(content))


def _bare(state_dict: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """``state_dict`` without what wrappers of the model add to names, unless two names would then be the same."""
    names = [bare_name(name) for name in state_dict]
    if all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    values = [value.detach() if isinstance(value, Tensor) else value for value in state_dict.values()]
    bare: Any = OrderedDict(zip(names if len(set(names)) == len(names) else state_dict, values, strict=True))
    if names == list(state_dict) and hasattr(state_dict, "_metadata"):
        bare._metadata = state_dict._metadata
    return bare
