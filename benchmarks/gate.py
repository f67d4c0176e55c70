"""`python -m benchmarks.gate`: fails when a floor of gates.toml does not hold.

A case passes when the 95 % interval of its median ratio, over at least 20 paired rounds, lies above the floor. One that
does not is run again, it alone, and its rounds are added, until it does or the retries are used up; then the median of
all its rounds decides. Floors on the share of the bandwidth, and ceilings on the host's time, are decided likewise. The
gates of a case share its rounds, in which all whom they are about take turns. Run it on a machine that is otherwise
idle: torch's many short parallel regions suffer more from company than one, which flatters the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.bench import CONTENDERS, DTYPES, Case, Result, run
from fusedopt.bench.contenders import OURS
from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Times, paired_ratio
from fusedopt.bench.tables import markdown, times
from fusedopt.messages import did_you_mean

from .host import step_times

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GATES = Path(__file__).with_name("gates.toml")
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
            moved = self.case.parameters * self.case.bytes_per_parameter
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
        content = tomllib.loads(path.read_text())
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


def go(gates: Sequence[Gate], rounds: int, flush: CacheFlush, probe: BandwidthProbe) -> None:
    """Run some rounds of the gates of one case.

    Raises:
        GateError: one of those whom they are about cannot run here, or is wrong.
    """
    case = gates[0].case
    names = dict.fromkeys(name for gate in gates for name in (gate.ours, gate.rival))
    result = run(case, list(names), rounds, flush, probe)
    for name, reason in result.left_out.items():
        raise GateError(f"{case.name}: {name}: {reason}")
    if any("bandwidth" in gate.limits for gate in gates) and not result.bandwidth:
        raise GateError(f"{case.name}: too small for its share of the bandwidth")
    for gate in gates:
        gate.take(result)


def check(
    gates: list[Gate],
    rounds: int,
    retries: int,
    say: Callable[[str], object],
    keep_going: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Run all gates, then those again that are not certain.

    Args:
        gates: of one device.
        rounds: of a go.
        retries: further goes that a gate may have.
        say: is told how each go went.
        keep_going: note why a gate cannot be checked, and check the others.
        after_each: called after each go.

    Raises:
        GateError: a gate cannot be checked.
    """
    flush, probe = (made(torch.device(gates[0].case.device)) for made in (CacheFlush, BandwidthProbe))

    def attempt(some: list[Gate]) -> None:
        try:
            go(some, rounds, flush, probe)
        except Exception as error:
            if not keep_going:
                raise
            known = isinstance(error, GateError)
            text = str(error) if known else f"{some[0].name}: {type(error).__name__}: {error}"
        else:
            text = ""
        if text and len(some) > 1:  # whom one is about must not cost the others theirs
            for gate in some:
                attempt([gate])
            return
        for gate in some:
            if text:
                gate.error = text.splitlines()[0]
                say(f"{gate.error}: not checked")
            else:
                verdict = "holds" if gate.certain else "does not hold so far" if gate.broken else "holds so far"
                say(f"{gate.name}: {', '.join(words(gate))}: {verdict}")
        after_each()

    open_gates = gates
    for _ in range(1 + retries):
        for _, of_case in itertools.groupby(open_gates, key=lambda gate: gate.case.name):
            attempt(list(of_case))
        open_gates = [gate for gate in open_gates if not gate.error and not gate.certain]


def words(gate: Gate) -> list[str]:
    """The measures with what is asked of them: the ratio, and what else has a limit."""
    units = {"ratio": (1.0, ""), "bandwidth": (100.0, " % of the bandwidth"), "host_us": (1.0, " µs on the host")}
    texts = []
    for name, values in gate.measures.items():
        factor, unit = units[name]
        digits = 2 if name == "ratio" else 1
        median, low, high = (f"{factor * value:.{digits}f}" for value in values)
        if name in gate.limits:
            texts.append(f"{median} [{low}, {high}]{unit}")
            texts.append(f"{'ceiling' if LIMITS[name] else 'floor'} {factor * gate.limits[name]:g}")
        elif name == "ratio":
            texts.append(f"{median} [{low}, {high}]{unit}")
    return texts


def table(gates: list[Gate]) -> str:
    """The verdicts."""
    on_gpu = gates[0].case.device == "cuda"
    more = on_gpu or any(set(gate.limits) != {"ratio"} for gate in gates)
    rows = []
    for gate in gates:
        measures, limits = gate.measures, gate.limits
        taken = times(statistics.median(gate.our_times.total)) if gate.our_times.total else ""
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*measures["ratio"]) if "ratio" in measures else ""
        row = [gate.case.name, gate.ours, taken, gate.rival, ratio, f"{limits['ratio']:g}" if "ratio" in limits else ""]
        if more:
            share, host = measures.get("bandwidth"), measures.get("host_us")
            row += [f"{share[0]:.1%}" if share else "", f"{limits['bandwidth']:.0%}" if "bandwidth" in limits else ""]
            row += [times(1e-6 * host[0]) if host else "", f"{limits['host_us']:g} µs" if "host_us" in limits else ""]
        rows.append([*row, str(len(gate.our_times.total)), gate.verdict])
    extra = ["of the bandwidth", "floor", "step on the host", "ceiling"] if more else []
    return markdown(["case", "contender", "time", "rival", "ratio", "floor", *extra, "rounds", "verdict"], rows)


def save(gates: list[Gate], path: Path, complete: bool) -> None:
    """Write all that was found as JSON; not ``complete`` while goes are to come."""
    device = gates[0].case.device
    content = {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "complete": complete,
        "gates": [gate.record() for gate in gates],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when every floor holds, 1 when one does not, 2 when they cannot be checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--without", action="append", help="no gates about this contender (may be repeated)")
    parser.add_argument("--about", action="append", help="only gates about this contender (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only cases of this dtype (may be repeated)")
    parser.add_argument("--gates", type=Path, default=GATES, help="the file of floors (default: gates.toml)")
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--json", type=Path, help="also write there, after each go, all that was measured")
    parser.add_argument("--keep-going", action="store_true", help="check the others when one cannot be checked")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def keep(complete: bool = False) -> None:
        if arguments.json:
            save(gates, arguments.json, complete)

    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise GateError("torch finds no usable CUDA device here")
        chosen = (getattr(arguments, name) or () for name in ("case", "without", "about", "dtype"))
        gates, rounds, retries = load(arguments.gates, arguments.device, *chosen)
        if not gates:
            raise GateError("no gates to check")
        check(gates, rounds, retries, lambda text: print(text, flush=True), arguments.keep_going, keep)
    except GateError as error:
        print(f"benchmarks.gate: {error}", file=sys.stderr)
        return 2
    keep(complete=True)
    print(f"\n{table(gates)}")
    if arguments.out:
        arguments.out.write_text(table(gates) + "\n")
    unchecked = [gate.error for gate in gates if gate.error]
    for text in unchecked:
        print(f"benchmarks.gate: {text}", file=sys.stderr)
    return 1 if any(gate.broken for gate in gates) else 2 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
