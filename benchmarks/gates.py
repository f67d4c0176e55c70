"""The floors of gates.toml, and the rounds that were run to check one."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedopt.bench import CONTENDERS, Case, Result
from fusedopt.bench.contenders import OURS
from fusedopt.bench.measure import Times, paired_ratio
from fusedopt.messages import did_you_mean

from .host import step_times

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["LEAST_ROUNDS", "LIMITS", "Gate", "GateError", "load"]

LEAST_ROUNDS = 20


class GateError(Exception):
    """gates.toml is wrong, or a contender cannot be timed; the message is one line."""


#: What can be asked of a case, by its key in gates.toml, and whether that is the most it may be (or else the least):
#: the rival's time over the contender's; the share of the memory's bandwidth; microseconds until the optimizer's step
#: returns, by itself and with warm caches, see host.step_times.
LIMITS = {"ratio": False, "bandwidth": False, "host_us": True}


@dataclass
class Gate:
    """What is asked of a contender in a case, and the rounds that were run to check it.

    Attributes:
        limits: by keys of ``LIMITS``.
        ours, rival: keys of ``CONTENDERS``: whose time is looked at, and whose it is compared with.
        our_times, their_times: of each round.
        bandwidth: bytes per second that the memory moved in each round; empty for a small case.
        steps: seconds until the step returned, by itself and warm; empty where ``host_us`` is not asked for.
        error: why it could not be checked.
        known: the measures of so many rounds, which take longer to resample than a GPU takes for the rounds.
    """

    case: Case
    limits: dict[str, float]
    rival: str
    ours: str = OURS
    our_times: Times = field(default_factory=Times)
    their_times: Times = field(default_factory=Times)
    bandwidth: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    error: str | None = None
    known: tuple[int, dict[str, tuple[float, float, float]]] = (0, {})

    @property
    def name(self) -> str:
        """Which case, and whose times."""
        return f"{self.case.name}: {self.ours} against {self.rival}"

    @property
    def measures(self) -> dict[str, tuple[float, float, float]]:
        """Median and its 95 % interval of all that was measured, by keys of ``LIMITS``."""
        ours = self.our_times.total
        if self.known[0] == len(ours):
            return self.known[1]
        pairs = {"ratio": (self.their_times.total, ours)} if ours else {}
        if self.bandwidth:
            moved = self.case.parameters * CONTENDERS[self.ours].bytes_moved(self.case)
            pairs["bandwidth"] = [moved / rate for rate in self.bandwidth], self.our_times.work
        if self.steps:
            pairs["host_us"] = self.steps, [1e-6] * len(self.steps)
        found = {}
        for name, (above, below) in pairs.items():
            quantiles, (low, high) = paired_ratio(above, below)
            found[name] = quantiles.median, low, high
        self.known = len(ours), found
        return found

    @property
    def broken(self) -> list[str]:
        """Those of the limits that the medians do not keep."""
        return [name for name, (median, _, _) in self.measures.items() if not self._keeps(name, median)]

    @property
    def certain(self) -> bool:
        """Whether the whole intervals keep the limits."""
        return all(self._keeps(name, high if LIMITS[name] else low) for name, (_, low, high) in self.measures.items())

    def _keeps(self, name: str, value: float) -> bool:
        limit = self.limits.get(name)
        return limit is None or (value <= limit if LIMITS[name] else value >= limit)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "not checked" if self.error or not self.our_times.total else "BROKEN" if self.broken else "holds"

    def take(self, result: Result) -> None:
        """Add the rounds of a result, in which both have taken part."""
        for times_, name in ((self.our_times, self.ours), (self.their_times, self.rival)):
            times_.total += result.times[name].total
            times_.host += result.times[name].host
            times_.queued += result.times[name].queued
        self.bandwidth += result.bandwidth
        if "host_us" in self.limits:
            self.steps += step_times(self.case, self.ours)

    def record(self) -> dict[str, Any]:
        """What was found, for a JSON."""
        measures = {
            name: dict(zip(("median", "low", "high"), values, strict=True)) for name, values in self.measures.items()
        }
        seconds = {
            "seconds": self.our_times.total,
            "rival_seconds": self.their_times.total,
            "host_seconds": self.our_times.host,
            "rival_host_seconds": self.their_times.host,
            "queued_seconds": self.our_times.queued,
            "rival_queued_seconds": self.their_times.queued,
        }
        return {
            "case": self.case.name,
            "parameters": self.case.parameters,
            "ours": self.ours,
            "rival": self.rival,
            "verdict": self.verdict,
            "broken": self.broken,
            "error": self.error,
            "rounds": len(self.our_times.total),
            "limits": self.limits,
            **measures,
            **{name: statistics.median(values) for name, values in seconds.items() if values},
        }


def parse_case(name: str, device: str) -> Case:
    """The case of a key of gates.toml.

    Raises:
        GateError: the key is not of the form it says.
    """
    parts = name.split("/")
    if len(parts) not in (4, 5):
        raise GateError(f"gates.toml: {name!r} is not workload/grouping/optimizer/recipe, with or without /dtype")
    try:
        return Case(*parts, device=device)
    except ValueError as error:
        raise GateError(f"gates.toml: {name!r}: {error}") from error


def parse_gates(name: str, value: Any, case: Case, rival: str) -> list[Gate]:
    """What a value of gates.toml asks: a number is the least ratio, a table names what it bounds, and whose times are
    compared, and a list has several of either.

    Raises:
        GateError: it is none of these, or names something else.
    """
    gates = []
    for asked in value if isinstance(value, list) and value else [value]:
        content = dict(asked) if isinstance(asked, dict) else {"ratio": asked}
        pair = {"rival": rival, **{key: content.pop(key) for key in ("ours", "rival") if key in content}}
        if not content or not set(content) <= set(LIMITS):
            raise GateError(
                f"gates.toml: {name!r} is {asked!r}; expected a number, or a table of {', '.join(LIMITS)} "
                "(and ours and rival)"
            )
        for limit in content.values():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)):
                raise GateError(f"gates.toml: {name!r} is {asked!r}; {limit!r} is not a number")
        for key, contender in pair.items():
            check_contender(f"gates.toml: {name!r}: {key}", contender)
        gates.append(Gate(case, content, **pair))
        if gates[-1].ours == gates[-1].rival:
            raise GateError(f"gates.toml: {name!r} compares {rival!r} with itself")
    return gates


def check_contender(what: str, name: Any) -> None:
    """Look a contender up.

    Raises:
        GateError: it is none.
    """
    if not isinstance(name, str) or name not in CONTENDERS:
        raise GateError(f"{what} is {name!r}; {did_you_mean(str(name), CONTENDERS)}")


def load(
    path: Path,
    device: str,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    about: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> tuple[list[Gate], int, int]:
    """The gates of a device, the rounds of a go, and how many further goes there may be.

    Args:
        path: of the file.
        device: ``'cpu'`` or ``'cuda'``.
        only: keys of the file, when not all are wanted.
        without: contenders whose gates are left out.
        about: contenders whose gates are wanted, when not all are.
        dtypes: of the cases, when not all are wanted.

    Raises:
        GateError: the file is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        rounds, retries, rival = (content["settings"][key] for key in ("rounds", "retries", "rival"))
    except OSError as error:
        raise GateError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise GateError(f"{path}: {error}") from error
    except KeyError as error:
        raise GateError(f"{path}: [settings] has no {error}") from error
    if rounds < LEAST_ROUNDS:
        raise GateError(f"gates.toml: rounds is {rounds}; a median needs {LEAST_ROUNDS}")
    for option, names in (("--without", without), ("--about", about)):
        for name in names:
            check_contender(option, name)
    floors = content.get(device, {})
    gates = {name: parse_gates(name, value, parse_case(name, device), rival) for name, value in floors.items()}
    for name in only:
        if name not in gates:
            raise GateError(f"no floor for {name!r} on {device}; there is one for {', '.join(gates)}")
    wanted = [gate for name in gates if not only or name in only for gate in gates[name]]
    if dtypes:
        wanted = [gate for gate in wanted if gate.case.dtype in dtypes]
    if about:
        wanted = [gate for gate in wanted if {gate.ours, gate.rival} & set(about)]
    return [gate for gate in wanted if not {gate.ours, gate.rival} & set(without)], rounds, retries
