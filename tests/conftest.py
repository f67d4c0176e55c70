from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from cases import HAS_EMULATOR, ISAS, OPTIONS, lacks, module, on_gpu
from sampling import chosen, products

#: For processes that tests start: where examples/ and benchmarks/ are, which are not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parent.parent)])
)

# How long an example takes says more about what else the machine does.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cover",
        choices=("values", "pairs", "all"),
        default="pairs",
        help="of parametrized tests, the cases that have every value, every pair of values (default), or all; with all "
        "also the tests that are marked full",
    )


@pytest.hookimpl(trylast=True)  # of what -k and -m have selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cover = config.getoption("--cover")
    if cover == "all" or any("::" in argument for argument in config.args):  # somebody asks for this very test
        return
    left_out = {item for item in items if item.get_closest_marker("full")}
    for cases in products([item for item in items if item not in left_out]):
        left_out |= set(cases) - chosen(cases, 1 if cover == "values" else 2)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether the run is `make test-full`; tests that repeat something do it less often otherwise."""
    return request.config.getoption("--cover") == "all"


@pytest.fixture(autouse=True)
def _restore_globals(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts with one seed, the default number of threads and the best instruction set."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    asked = getattr(getattr(request.node, "callspec", None), "params", {})
    backend = asked.get("backend")
    cls = OPTIONS[asked["option"]][0] if asked.get("option") in OPTIONS else asked.get("cls")
    if isinstance(backend, str) and hasattr(cls, "rule") and (reason := lacks(backend, cls.rule)) is not None:
        pytest.skip(reason)
    device_wanted = isinstance(backend, str) and on_gpu(backend)
    if device_wanted:  # what a test creates without saying where is on the GPU then
        torch.set_default_device("cuda")
    yield
    if device_wanted:
        torch.set_default_device(None)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if module is not None:
        module.use_cpu_isa(ISAS[-1])
    if HAS_EMULATOR:
        assert module is not None
        module.emulator.configure()
        module.emulator.use_ptx([])
