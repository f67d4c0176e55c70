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
from pathlib import Path

import torch

import fusedopt
from fusedopt.bench import DTYPES, run
from fusedopt.bench.measure import BandwidthProbe, CacheFlush
from fusedopt.bench.tables import markdown, times

from .gates import LIMITS, Gate, GateError, load

GATES = Path(__file__).with_name("gates.toml")


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
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
        arguments.out.write_text(table(gates) + "\n", encoding="utf-8")
    unchecked = [gate.error for gate in gates if gate.error]
    for text in unchecked:
        print(f"benchmarks.gate: {text}", file=sys.stderr)
    return 1 if any(gate.broken for gate in gates) else 2 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
