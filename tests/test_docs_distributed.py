"""docs/distributed.md: every fragment runs in four processes, and clips by the norm that one process would find."""

from __future__ import annotations

import ast
import datetime
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_docs import DOCS, REPOSITORY
from torch import nn

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

WORLD = 4
PAGE = (DOCS / "distributed.md").read_text()
SETUP = "Set-up of the examples"
#: Examples that train the model of the set-up by `train`: how many parts of the data their processes have together.
PARTS = {
    "FSDP2": 4,
    "HSDP": 4,
    "CPU offload": 4,
    "Tensor parallelism": 1,
    "Tensor parallelism, 2": 1,
    "Tensor parallelism with FSDP2": 2,
    "FSDP1": 4,
    "ZeRO": 4,
    "ZeRO, 2": 4,
    "A norm that you have": 4,
}
#: Other examples that end with a step that clips by a norm.
CLIP = [
    "Mixed precision",
    "Gradient accumulation",
    "Pipeline stages",
    "Several optimizers in a process",
    "Loss scaling",
    "Loss scaling, 2",
    "Checkpoints",
]


def examples() -> dict[str, str]:
    """The Python of each section by its heading, with a number from the second fragment on."""
    found: dict[str, str] = {}
    for section in re.split(r"^##+ ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for number, fragment in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL), 1):
            found[heading if number == 1 else f"{heading}, {number}"] = fragment
    return found


def run(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(folder)
    torch.set_num_threads(1)
    settings = dict(init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    dist.init_process_group = functools.partial(
        dist.init_process_group, **settings, timeout=datetime.timedelta(seconds=60)
    )
    norms: dict[str, float] = {}
    namespace: dict[str, Any] = {}
    for heading, example in examples().items():
        namespace.pop("optimizer", None)
        exec(compile(example, f"distributed.md, {heading}", "exec"), namespace)
        optimizer = namespace.get("optimizer")
        report = getattr(getattr(optimizer, "optim", optimizer), "last_step", None)
        if report is not None and report.grad_norm is not None:
            norms[heading] = float(report.grad_norm)
    torch.save(norms, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@functools.cache
def norm_of_one_process(parts: int) -> float:
    """What torch finds in the third step where one process trains the model with all parts of the data."""
    namespace: dict[str, Any] = {"torch": torch, "nn": nn}
    make_model, make_data = re.findall(r"^def make_\w+\(.*?(?=^\S)", examples()[SETUP], re.DOTALL | re.MULTILINE)
    exec(f"{make_model}\n{make_data}", namespace)
    model = namespace["make_model"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batches in zip(*map(namespace["make_data"], range(parts)), strict=True):
        optimizer.zero_grad()
        for x in batches:
            (model(x).square().sum() / parts).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(norm)


@pytest.mark.slow
def test_examples_clip_by_the_same_norm_in_every_process(tmp_path: Path) -> None:
    """One test, so that the processes are started once."""
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=WORLD)
    norms = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for example in (*PARTS, *CLIP):
        found = {mine[example] for mine in norms}
        assert len(found) == 1, f"{example}: {found}"
        assert min(found) > 1, f"{example}: nothing was clipped"
        if example in PARTS:
            assert min(found) == pytest.approx(norm_of_one_process(PARTS[example]), rel=1e-5), example


def test_every_example_is_looked_at() -> None:
    assert set(examples()) == {SETUP, *PARTS, *CLIP, "Optimizer in backward"}


def test_the_messages_are_those_of_the_source() -> None:
    """With … for what is filled in."""
    texts = []
    for path in (REPOSITORY / "fusedopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    (table,) = re.findall(r"^## What is refused\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    messages = re.findall(r"\| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(messages) == table.count("\n| ") - 1
    for message in messages:
        assert any(message in text for text in texts), message
