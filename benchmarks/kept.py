"""Fused optimizers that keep their state in fewer bits, as contenders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import fusedopt
from fusedopt.bench.cases import DTYPES, OPTIMIZERS, Case
from fusedopt.bench.contenders import CONTENDERS, OURS, Fused
from fusedopt.rules.codes import CODE_BLOCK

__all__ = ["KEPT", "OnPrecision", "Precise"]

#: Bytes of one element of a state. Codes have a scale of two bytes for each block.
_STATES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1 + 2 / CODE_BLOCK}
_MASTERS = {"float32": 4.0, "split": 2.0, "split8": 1.0}


@dataclass(frozen=True)
class Precise:
    """How an optimizer keeps what it knows.

    Args:
        description: in a line.
        settings: arguments of the optimizer.
        dtype: the one of ``DTYPES`` that its parameters have to have, where it matters.
    """

    description: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    def held(self, case: Case) -> float:
        """Bytes for each parameter: it, its gradient, its states and what is carried."""
        return self._both_ways(case) + DTYPES[case.dtype][1].itemsize

    def moved(self, case: Case) -> float:
        """Bytes that a step moves for each parameter."""
        param = DTYPES[case.dtype][0].itemsize
        plain = param * (1 + OPTIMIZERS[case.optimizer].states)
        return case.bytes_per_parameter + 2 * (self._both_ways(case) - plain)

    def _both_ways(self, case: Case) -> float:
        """Bytes that a step reads and writes."""
        param = DTYPES[case.dtype][0].itemsize
        state = _STATES.get(self.settings.get("state_dtype", ""), float(param))
        master = _MASTERS[self.settings["master"]] if "master" in self.settings else 0.0
        average = 4.0 if "ema" in self.settings else 0.0
        return param + OPTIMIZERS[case.optimizer].states * state + master + average


CHANCE = {"stochastic_rounding": True}
EMA = {"ema": {"decay": 0.999}}
#: By the ends of their names.
KEPT: dict[str, Precise] = {
    "bf16-states": Precise("bfloat16 states", {"state_dtype": "bfloat16"}),
    "bf16-states-chance": Precise("bfloat16 states, by chance", {"state_dtype": "bfloat16", **CHANCE}),
    "fp16-states": Precise("float16 states", {"state_dtype": "float16"}),
    "int8-states": Precise("int8 states", {"state_dtype": "int8"}),
    "ema": Precise("an average in the update pass", EMA),
    "chance": Precise("weights by chance", CHANCE, "bf16"),
    **{
        f"{master}-{name}": Precise(f"master {of}, {form} states", {"master": of, "state_dtype": form}, "bf16")
        for master, of in (("master", "float32"), ("split", "split"), ("split8", "split8"))
        for name, form in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8"))
    },
}


class OnPrecision(Fused):
    """On compiled kernels."""

    precise: ClassVar[Precise]
    approximate = True
    backend = "native"

    @classmethod
    def of(cls, precise: Precise) -> type[OnPrecision]:
        """The contender of one way."""
        about = {"precise": precise, "description": f"fusedopt with {precise.description}"}
        return type("OnPrecision", (cls,), about)

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if cls.precise.dtype not in (None, case.dtype):
            return f"is for parameters in {cls.precise.dtype}"
        return fusedopt.backends.NativeBackend.unavailable(torch.device(case.device))

    @classmethod
    def bytes_moved(cls, case: Case) -> float:
        return cls.precise.moved(case)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind = getattr(fusedopt, f"Fused{OPTIMIZERS[self.case.optimizer].name}")
        return kind(groups, clip_grad=self.clip_grad, backend=self.backend, **self.precise.settings)


CONTENDERS.update({f"{OURS}-{name}": OnPrecision.of(precise) for name, precise in KEPT.items()})
