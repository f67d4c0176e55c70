"""Measuring a case once for all its contenders, and handing the times to pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.bench import Case, Result, run
from fusedopt.bench.contenders import CONTENDERS, OURS
from fusedopt.bench.measure import BandwidthProbe, CacheFlush
from fusedopt.cli.info import info

from .record import commit, rounded


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedopt")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to step (default: cpu)")
    group.addoption("--bench-threads", type=int, help="CPU threads (default: torch's choice)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # other packages warn, and that is their matter


class ReplayClock:
    """A timer that has pytest-benchmark see durations taken before.

    pytest-benchmark times one function after the other, so that a drift of the machine would meet them differently.
    Here all contenders of a case have taken turns already; the clock tells what each of its rounds took.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, benchmark: Any, durations: list[float]) -> None:
        """Make ``durations`` the rounds of ``benchmark``."""
        left = iter(durations)

        def advance() -> None:
            self._now += next(left)

        benchmark.pedantic(advance, rounds=len(durations))


CLOCK = ReplayClock()


class Lab:
    """Measures each case when the first of its contenders asks, with all that were selected."""

    def __init__(self, session: pytest.Session):
        self.device = torch.device(session.config.getoption("--bench-device"))
        threads = session.config.getoption("--bench-threads")
        if threads:
            torch.set_num_threads(threads)
        self._flush = CacheFlush(self.device)
        self._probe = BandwidthProbe(self.device)
        self._session = session
        self._last: tuple[str, Result] | None = None

    def result(self, case: Case, rounds: int) -> Result:
        """The result of a case; of the last one without measuring again."""
        if self._last is None or self._last[0] != case.name:
            parameters = [getattr(item, "callspec", None) for item in self._session.items]
            names = [
                spec.params["contender"]
                for spec in parameters
                if spec and "contender" in spec.params and spec.params["entry"].case.name == case.name
            ]
            self._last = case.name, run(case, names, rounds, self._flush, self._probe)
        return self._last[1]

    def report(self, benchmark: Any, case: Case, rounds: int, contender: str, kind: str) -> None:
        """Fill in the benchmark of one contender; skip or fail the test of one that was left out."""
        result = self.result(case, rounds)
        if contender in result.left_out:
            reason = result.left_out[contender]
            if CONTENDERS[contender].unavailable(case):
                pytest.skip(reason)
            if contender.startswith(OURS):
                pytest.fail(reason)
            pytest.xfail(reason)  # a wrong result of a rival is reported, and not ours to mend
        times = result.times[contender]
        benchmark.group = case.name
        benchmark.extra_info.update(
            kind=kind,
            contender=contender,
            case={key: value for key, value in vars(case).items() if isinstance(value, (str, bool))},
            tensors=len(case.shapes),
            groups=len(case.groups),
            parameters=case.parameters,
            bytes_per_parameter=case.bytes_per_parameter,
            bandwidth=result.bandwidth,
            extra_memory=result.extra_memory[contender],
        )
        if case.device == "cuda":
            benchmark.extra_info.update(host=times.host, queued=times.queued)
        CLOCK.replay(benchmark, times.total)


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.session)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the machine is; neither its name in a network nor paths on it."""
    for key in ("node", "python_build"):
        machine_info.pop(key, None)
    machine_info["fusedopt"] = fusedopt.__version__
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = config.getoption("--bench-threads") or torch.get_num_threads()
    machine_info["device"] = config.getoption("--bench-device")
    if machine_info["device"] == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
    machine_info["info"] = [line for line in info().splitlines() if not line.startswith("Python ")]


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """No more than the commit, and whether the tree was changed."""
    commit_info.clear()
    commit_info.update(commit())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Leave out what says nothing here, and digits that no clock has."""
    output_json["machine_info"] = {
        key: value for key, value in output_json["machine_info"].items() if key not in ("cpu", "release")
    }
    for record in output_json["benchmarks"]:
        for key in ("params", "param", "options", "fullname"):
            del record[key]
        record["stats"] = {"data": rounded(record["stats"]["data"])}
        record["extra_info"] = rounded(record["extra_info"])
