"""`python -m benchmarks.gate`: fails when a floor of gates.toml does not hold.

A case passes when the 95 % interval of its median ratio, over at least 20 paired rounds, lies above the floor. One that
does not is run again, it alone, and its rounds are added, until it does or the retries are used up; then the median of
all its rounds decides. Run it on a machine that is otherwise idle: torch's many short parallel regions suffer more from
company than one, which flatters the ratios.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusedopt.bench import Case, run
from fusedopt.bench.contenders import OURS
from fusedopt.bench.measure import BandwidthProbe, CacheFlush, paired_ratio
from fusedopt.bench.tables import markdown, times

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GATES = Path(__file__).with_name("gates.toml")
LEAST_ROUNDS = 20


class GateError(Exception):
    """gates.toml is wrong, or a contender cannot be timed; the message is one line."""


@dataclass
class Gate:
    """A floor, and the rounds that were run to check it."""

    case: Case
    floor: float
    rival: str
    goes: int = 0
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Median of the rival's time over ours, and its 95 % interval."""
        quantiles, (low, high) = paired_ratio(self.theirs, self.ours)
        return quantiles.median, low, high

    @property
    def passes(self) -> bool:
        """Whether the median reaches the floor."""
        return self.ratio[0] >= self.floor

    @property
    def certain(self) -> bool:
        """Whether the whole interval reaches the floor."""
        return self.ratio[1] >= self.floor

    def go(self, rounds: int, flush: CacheFlush, probe: BandwidthProbe) -> None:
        """Run some rounds.

        Raises:
            GateError: one of the two cannot run here, or is wrong.
        """
        result = run(self.case, [OURS, self.rival], rounds, flush, probe)
        for name, reason in result.left_out.items():
            raise GateError(f"{self.case.name}: {name}: {reason}")
        self.goes += 1
        self.ours += result.times[OURS].total
        self.theirs += result.times[self.rival].total


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


def load(path: Path, device: str, only: Sequence[str] = ()) -> tuple[list[Gate], int, int]:
    """The gates of a device (only those of these keys), the rounds of a go, and how many further goes there may be.

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
    floors = content.get(device, {})
    gates = {name: Gate(parse_case(name, device), floor, rival) for name, floor in floors.items()}
    for name in only:
        if name not in gates:
            raise GateError(f"no floor for {name!r} on {device}; there is one for {', '.join(gates)}")
    return [gate for name, gate in gates.items() if not only or name in only], rounds, retries


def check(gates: list[Gate], rounds: int, retries: int, say: Callable[[str], object]) -> bool:
    """Run all gates, then those again that are not certain; True when all pass."""
    flush, probe = (made(torch.device(gates[0].case.device)) for made in (CacheFlush, BandwidthProbe))
    open_gates = gates
    for _ in range(1 + retries):
        for gate in open_gates:
            gate.go(rounds, flush, probe)
            ratio, low, high = gate.ratio
            verdict = "holds" if gate.certain else "holds so far" if gate.passes else "does not hold so far"
            say(f"{gate.case.name}: {ratio:.2f} [{low:.2f}, {high:.2f}], floor {gate.floor:g}: {verdict}")
        open_gates = [gate for gate in open_gates if not gate.certain]
    return all(gate.passes for gate in gates)


def table(gates: list[Gate]) -> str:
    """The verdicts."""
    rows = []
    for gate in gates:
        ratio, low, high = gate.ratio
        ours = sorted(gate.ours)[len(gate.ours) // 2]
        verdict = "holds" if gate.passes else "BROKEN"
        cells = [gate.case.name, times(ours), f"{ratio:.2f} [{low:.2f}, {high:.2f}]", f"{gate.floor:g}"]
        rows.append([*cells, str(len(gate.ours)), verdict])
    return markdown(["case", OURS, f"× {gates[0].rival}", "floor", "rounds", "verdict"], rows)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 when every floor holds, 1 when one does not, 2 when they cannot be checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--gates", type=Path, default=GATES, help="the file of floors (default: gates.toml)")
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise GateError("torch finds no usable CUDA device here")
        gates, rounds, retries = load(arguments.gates, arguments.device, arguments.case or ())
        if not gates:
            raise GateError("no gates to check")
        good = check(gates, rounds, retries, lambda text: print(text, flush=True))
    except GateError as error:
        print(f"benchmarks.gate: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(gates)}")
    if arguments.out:
        arguments.out.write_text(table(gates) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
