"""What a step takes when its state lies in fewer bytes: ``python -m benchmarks.fewer_bytes``, on a CPU.

All take turns in one run, with AMP and clipping, on tensors too large for the caches: torch's fused AdamW, ours in each
precision, and other packages that keep less than float32. Their results are compared first. Parameters are float32
where nothing else is said; those with a master are bfloat16, as their gradients.

Bytes that are held are counted by the tensors that there are: parameters, gradients and state. Bytes that are moved
are those of two passes, and of torch those of unscaling, finding the norm, clipping and the update; of other packages
nobody has counted them. Of the memory's bandwidth is the share that moving these bytes in the measured time is of what
``a += b`` on large arrays moves in the same rounds.

``--instructions`` counts, in processes of their own, the instructions that one step executes for each element, with
callgrind, which hides AVX-512: they are those of the AVX2 kernels.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedopt.bench import CONTENDERS, DTYPES, Case, Contender
from fusedopt.bench.contenders import OURS, TorchFused, initial_tensors
from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Quantiles, interleave, paired_ratio
from fusedopt.bench.run import CHECKED_STEPS, find_wrong
from fusedopt.bench.tables import markdown, times
from fusedopt.bench.workloads import uniform

from .kept import CHANCE, KEPT, OnPrecision, Precise
from .peers import BitsAndBytes8bit, FlashOptim, Optimi, Peer, TorchAO8bit
from .record import environment, save

ROOT = Path(__file__).parents[1]
FLOAT32 = "float32"
PROBE = "a += b"
MIB = 2**20


class Plain(OnPrecision):
    """As torch keeps it."""

    precise: ClassVar[Precise] = Precise("float32")


class PlainHalf(OnPrecision):
    """As torch keeps it, of bfloat16 parameters."""

    precise: ClassVar[Precise] = Precise("bfloat16")


class HalfStatesByChance(OnPrecision):
    """Of bfloat16 parameters with an exact float32, whose bfloat16 states are rounded by chance."""

    precise: ClassVar[Precise] = Precise("", {"master": "split", "state_dtype": "bfloat16", **CHANCE}, "bf16")


class Lerped(Plain):
    """A float32 step, and torch's update of an average of the weights, which is a pass of its own."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.averages = [param.detach().clone() for param in self.params.values()]
        return super().build(groups)

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        torch._foreach_lerp_(self.averages, list(self.params.values()), 1e-3)

    @classmethod
    def bytes_moved(cls, case: Case) -> float:
        return case.bytes_per_parameter + 12.0


class TorchPasses(TorchFused):
    """Counts what its passes move: unscaling (read and write), the norm, clipping (read and write), the update."""

    @classmethod
    def bytes_moved(cls, case: Case) -> float:
        param, grad = (dtype.itemsize for dtype in DTYPES[case.dtype])
        return 6 * param + 6 * grad


class Kahan(Optimi):
    """Its own answer to bfloat16 parameters: what they lack is a third state."""

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "kahan_sum": True}


#: Who takes part: a name in the table, the contender, and the dtype of its parameters.
ROWS: dict[str, tuple[type[Contender], str]] = {
    "torch fused, float32": (TorchPasses, "fp32"),
    FLOAT32: (Plain, "fp32"),
    "bf16 states": (CONTENDERS[f"{OURS}-bf16-states"], "fp32"),
    "bf16 states, by chance": (CONTENDERS[f"{OURS}-bf16-states-chance"], "fp32"),
    "float16 states": (CONTENDERS[f"{OURS}-fp16-states"], "fp32"),
    "int8 states": (CONTENDERS[f"{OURS}-int8-states"], "fp32"),
    "torch fused, bf16": (TorchPasses, "bf16"),
    "bf16 parameters": (PlainHalf, "bf16"),
    "bf16 parameters, by chance": (CONTENDERS[f"{OURS}-chance"], "bf16"),
    **{
        f"{precise.description}": (CONTENDERS[f"{OURS}-{name}"], "bf16")
        for name, precise in KEPT.items()
        if "master" in precise.settings
    },
    "master split, bfloat16 states, by chance": (HalfStatesByChance, "bf16"),
    "float32, average in the pass": (CONTENDERS[f"{OURS}-ema"], "fp32"),
    "float32, then torch lerp": (Lerped, "fp32"),
    "bitsandbytes, 8-bit states": (BitsAndBytes8bit, "fp32"),
    "torchao, 8-bit states": (TorchAO8bit, "fp32"),
    "optimi, bf16, Kahan": (Kahan, "bf16"),
    "flashoptim, not quantized": (FlashOptim, "fp32"),
}
TORCH = next(iter(ROWS))
#: Whose instructions are counted: a process that callgrind looks at takes a minute.
COUNTED = (
    FLOAT32,
    "bf16 states",
    "bf16 states, by chance",
    "float16 states",
    "int8 states",
    "master split, bfloat16 states",
    "master split8, int8 states",
    "float32, average in the pass",
)
#: What of others cannot take part, and why.
ELSEWHERE = {
    "flashoptim, quantized, or 24 or 32 bits of master": "raises without CUDA",
    "optimi, one Triton launch": "needs a GPU",
    "TransformerEngine, apex": "are for CUDA alone",
}


def tensors_in(value: Any) -> list[Tensor]:
    """All plain tensors in an entry of a state, also in subclasses and objects that are made of several."""
    if isinstance(value, Mapping):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    if not isinstance(value, Tensor):
        return [tensor for each in getattr(value, "__dict__", {}).values() for tensor in tensors_in(each)]
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [tensor for name in names for tensor in tensors_in(getattr(value, name))]
    return [value]


def held(contender: Contender) -> float:
    """Bytes for each parameter that are in memory when the step begins; tables that states share count once."""
    kept: dict[int, Tensor] = {}
    params: list[Tensor] = list(contender.params.values())
    grads = [param.grad for param in params if param.grad is not None]
    averages = getattr(contender, "averages", [])
    states = [tensor for entry in contender.optimizer.state.values() for tensor in tensors_in(entry)]
    for tensor in (*params, *grads, *averages, *states):
        kept[tensor.data_ptr()] = tensor
    return sum(tensor.nbytes for tensor in kept.values()) / sum(param.numel() for param in params)


def share_gradients(contender: Contender, buffers: dict[str, Tensor]) -> None:
    """Give a contender gradients that others have, too: each takes its turn, and what it wrote is restored before."""
    contender._grads = [buffers[name] for name in contender.params]
    for param, grad in zip(contender.params.values(), contender._grads, strict=True):
        param.grad = grad


def measure(names: Sequence[str], tensors: int, elements: int, rounds: int) -> dict[str, Any]:
    """Seconds of each one's steps, of the probe, and bytes."""
    device = torch.device("cpu")
    cases = {dtype: Case("bytes", dtype=dtype, custom=lambda: uniform(tensors, elements)) for dtype in ("fp32", "bf16")}
    gradients = {dtype: {name: grad for name, _, grad in initial_tensors(case)} for dtype, case in cases.items()}
    buffers = {dtype: {name: grad.clone() for name, grad in mine.items()} for dtype, mine in gradients.items()}
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name in names:
        kind, dtype = ROWS[name]
        reason = kind.unavailable(cases[dtype])
        if reason is None:
            try:
                made = kind(cases[dtype], gradients[dtype])
                share_gradients(made, buffers[dtype])
                for factor in CHECKED_STEPS:
                    made.set_gradients(factor)
                    made()
                made.set_gradients()
                if not made.writes_gradients:
                    share_gradients(made, gradients[dtype])
                contenders[name] = made
                continue
            except Exception as error:  # another package's fault
                if issubclass(kind, OnPrecision):
                    raise
                reason = f"fails: {type(error).__name__}: {error}".splitlines()[0]
        left_out[name] = reason
    for dtype, case in cases.items():
        alike = {name: each for name, each in contenders.items() if ROWS[name][1] == dtype}
        for name, reason in (find_wrong(case, alike) if alike else {}).items():
            left_out[name] = reason
            del contenders[name]
    flush, probe = CacheFlush(device), BandwidthProbe(device)

    def prepare(name: str) -> None:
        if name in contenders:
            contenders[name].prepare()
        flush()

    functions: dict[str, Callable[[], object]] = {**contenders, PROBE: probe}
    taken = {name: found.total for name, found in interleave(functions, rounds, prepare, device).items()}
    rows = [
        {
            "name": name,
            "held": held(contender),
            "freed": sum(param.grad.nbytes for param in contender.params.values() if param.grad is not None)
            / contender.case.parameters,
            "moved": None if issubclass(ROWS[name][0], Peer) else ROWS[name][0].bytes_moved(contender.case),
            "seconds": taken[name],
        }
        for name, contender in contenders.items()
    ]
    return {
        "tensors": tensors,
        "elements": elements,
        "rounds": rounds,
        "moved_by_probe": probe.moved,
        "probe_seconds": taken[PROBE],
        "rows": rows,
        "left_out": {**left_out, **ELSEWHERE},
    }


def table(content: Mapping[str, Any]) -> str:
    """The figures as Markdown, a row for each precision, and who is left out."""
    seconds = {row["name"]: row["seconds"] for row in content["rows"]}
    elements = content["tensors"] * content["elements"]
    counted = content.get("instructions", {})
    lines = []
    for row in content["rows"]:
        mine, moved = row["seconds"], row["moved"]
        line = [
            row["name"],
            f"{row['held']:.4g}",
            f"{row['held'] - row['freed']:.4g}",
            "–" if moved is None else f"{moved:.4g}",
        ]
        line.append(times(Quantiles.of(mine).median))
        line += [_ratio(seconds[base], mine) if base in seconds else "–" for base in (FLOAT32, TORCH)]
        if moved is None:
            line.append("–")
        else:
            rounds = zip(mine, content["probe_seconds"], strict=True)
            bytes_, of_probe = moved * elements, content["moved_by_probe"]
            line.append(f"{statistics.median(bytes_ / own * probe / of_probe for own, probe in rounds):.0%}")
        if counted:
            line.append(f"{counted[row['name']]:.1f}" if row["name"] in counted else "–")
        lines.append(line)
    rates = [content["moved_by_probe"] / each / 1e9 for each in content["probe_seconds"]]
    head = ["", "bytes held", "without gradients", "bytes moved", "a step"]
    head += ["speed: float32 = 1", "torch fused = 1", "of the bandwidth"]
    head += ["instructions per element"] if counted else []
    notes = [f"- left out: {name}: {reason}" for name, reason in content["left_out"].items()]
    rate = f"The memory moves {statistics.median(rates):.3g} GB/s."
    return "\n".join([markdown(head, lines), "", rate, *([""] if notes else []), *notes])


def _ratio(slow: list[float], fast: list[float]) -> str:
    """How many times as fast, with its 95 % interval."""
    ratio, (low, high) = paired_ratio(slow, fast)
    return f"{ratio.median:.2f} [{low:.2f}, {high:.2f}]"


def count_instructions(name: str, elements: int, steps: int) -> float:
    """Instructions per element of a step, in a process of its own: those in ``StepPlan::step``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        command = ["valgrind", "-q", "--tool=callgrind", "--cache-sim=no", f"--callgrind-out-file={out}"]
        command += ["--toggle-collect=fusedopt::StepPlan::step*", sys.executable, "-m", "benchmarks.fewer_bytes"]
        command += ["--child", name, str(elements), str(steps)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or not int(found[1]):
        raise RuntimeError("callgrind saw no StepPlan::step: has fusedopt._C been stripped of its symbols?")
    return int(found[1]) / (elements * steps)


def measure_instructions(names: Sequence[str], elements: int = 2**18, steps: int = 3) -> dict[str, float]:
    """Instructions per element of those of COUNTED, without the pass that finds the norm.

    There are so many elements that what is done once for a step is less than a hundredth.
    """
    counted = [name for name in names if name in COUNTED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(counted, pool.map(lambda name: count_instructions(name, elements, steps), counted), strict=True)
        )


def child(name: str, elements: int, steps: int) -> None:
    """Make steps, for callgrind to look at."""
    torch.set_num_threads(1)
    kind, dtype = ROWS[name]
    case = Case("bytes", dtype=dtype, recipe="bare", custom=lambda: uniform(1, elements))
    contender = kind(case, {key: grad for key, _, grad in initial_tensors(case)})
    for _ in range(steps):
        contender()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fewer_bytes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tensors", type=int, default=64, help="default: 64")
    parser.add_argument("--elements", type=int, default=MIB, help="of each tensor (default: 1 Mi)")
    parser.add_argument("--rounds", type=int, default=25, help="default: 25")
    parser.add_argument("--quick", action="store_true", help="a look: 8 tensors, 5 rounds")
    parser.add_argument("--case", action="append", choices=ROWS, help="only this row (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--instructions", action="store_true", help="also count instructions; takes valgrind")
    parser.add_argument("--out", type=Path, help="also write the figures there, as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child[0], int(args.child[1]), int(args.child[2]))
        return
    torch.set_num_threads(args.threads)
    tensors, rounds = (8, 5) if args.quick else (args.tensors, args.rounds)
    names = args.case or list(ROWS)
    content: dict[str, Any] = {"environment": environment(), **measure(names, tensors, args.elements, rounds)}
    if args.instructions:
        content["instructions"] = measure_instructions(names)
    print(f"torch {torch.__version__}, {args.threads} threads, {rounds} rounds, {tensors} x {args.elements} elements\n")
    print(table(content))
    if args.out:
        save(content, args.out)


if __name__ == "__main__":
    main()
