"""The docstring of every public class and function names each of its arguments, for the reference on the site."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from enum import EnumMeta
from typing import Any

import pytest

from fusedopt.training.registry import accepted_arguments
from fusedopt.training.schedulers import CosineAnnealingWeightDecay, LRSchedulerMixin, MomentumSchedulerMixin

#: The modules of the reference (docs/reference); tests/trainers has those that need a trainer.
MODULES = [
    "fusedopt",
    "fusedopt.amp",
    "fusedopt.training.averaging",
    "fusedopt.training.config",
    "fusedopt.training.constructors",
    "fusedopt.training.engine",
    "fusedopt.training.schedulers",
    "fusedopt.training.wrappers",
]
#: These set param_name themselves.
BOUND = (LRSchedulerMixin, MomentumSchedulerMixin, CosineAnnealingWeightDecay)


def documented(target: Any) -> set[str]:
    """The names in the section of the arguments. Several may share a line: ``begin, end: see …``."""
    section = re.search(r"^Args:\n((?:    .*\n|\n(?=    ))+)", f"{inspect.getdoc(target)}\n", re.MULTILINE)
    lines = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    return {name for line in lines for name in line.split(", ")}


def undocumented(target: Callable[..., Any]) -> set[str]:
    """The arguments without a word. ``*args`` and ``**kwargs`` are documented, or else all that they stand for is."""
    parameters = inspect.signature(target).parameters.values()
    variable = {each.name for each in parameters if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    missing = {each.name for each in parameters} - documented(target)
    if missing & variable and isinstance(target, type):
        missing = (missing - variable) | ((accepted_arguments(target) or variable) - documented(target))
        missing -= {"param_name"} if issubclass(target, BOUND) else set()
    return missing


def undocumented_in(module: str) -> dict[str, list[str]]:
    """The same of all that a module makes public, by name. An enum's one argument is its value."""
    public = importlib.import_module(module)
    found = {}
    for name in public.__all__:
        target = getattr(public, name)
        ours = getattr(target, "__module__", "").startswith("fusedopt")
        if ours and (inspect.isclass(target) or inspect.isfunction(target)) and not isinstance(target, EnumMeta):
            found[name] = sorted(undocumented(target))
    return {name: missing for name, missing in found.items() if missing}


@pytest.mark.parametrize("module", MODULES)
def test_every_argument_is_documented(module: str) -> None:
    assert undocumented_in(module) == {}


def test_every_argument_is_documented_for_mmengine() -> None:
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    assert undocumented_in("fusedopt.integrations.mmengine") == {}
