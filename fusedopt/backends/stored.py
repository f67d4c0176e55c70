"""What a step reads and writes of one parameter, in whatever form it is kept: plain tensor operations.

This is csrc/storage.h at work: everything is calculated in the compute dtype, and read and stored in the form that it
is kept in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import Precision, StateColumn, compute_dtype
from ..rules.codes import canonical_order, decode, encode, flattened, narrow, random_halves, split, unflattened
from ..rules.masters import joined_with_master

__all__ = ["Chance", "Stored"]


class Chance(NamedTuple):
    """Whose random bits round a parameter in one step; see Note [Random bits] in csrc/storage.h."""

    seed: int
    stream: int
    step: int
    numbers: tuple[int, tuple[int, ...], tuple[int, ...]] | None  # of the elements, see fusedopt/shards/numbers.py

    def halves(self, column: int, like: Tensor) -> Tensor:
        """16 bits for each element of a parameter, in canonical order."""
        numbers = torch.zeros((), dtype=torch.int64, device=like.device)
        first, sizes, steps = self.numbers or (0, (like.numel(),), (1,))
        for size, step in zip(sizes, steps, strict=True):
            numbers = numbers[..., None] + torch.arange(size, device=like.device) * step
        return random_halves(self.seed, self.stream, column, self.step, first + numbers.reshape(-1))


class Stored:
    """One parameter, as far as it is in this process, with its state.

    Args:
        param: the local tensor.
        precision: in what form its state is kept.
        state: its state, local tensors.
        chance: of what is rounded by chance.
    """

    def __init__(self, param: Tensor, precision: Precision, state: Mapping[str, Tensor], chance: Chance):
        self._param = param
        self._state = state
        self._chance = chance
        self._by_chance = precision.seed is not None
        self._order = canonical_order(param)
        self._dtype = compute_dtype(param)
        self._master = precision.master if precision.masters(param) else None

    def column(self, column: StateColumn, key: str) -> Tensor:
        """The values of a state of the rule, in the compute dtype; where it is kept in that, itself."""
        stored = self._state[key]
        form = column.form_at(key)
        if form is None:
            return stored.to(self._dtype)
        if form == "float16_root":
            return decode(stored, form, stored.numel()).to(self._dtype)
        values = decode(stored, form, self._param.numel()).to(self._dtype)
        return unflattened(values, self._order, self._param.shape)

    def put_column(self, column: StateColumn, key: str, values: Tensor, number: int) -> None:
        """Store the values of a state, which is the rule's ``number``-th, from 1."""
        stored, form = self._state[key], column.form_at(key)
        if stored is values:
            return
        if form in ("int8", "int8_unsigned"):
            flat = flattened(values, self._order).float()
            by_chance = form == "int8_unsigned" or self._by_chance
            stored.copy_(encode(flat, form, self._chance.halves(number, self._param) if by_chance else None))
        else:
            self._round_into(stored, values, number, form)

    def weights(self) -> Tensor:
        """The parameter's values in the compute dtype; where it is kept in that, itself."""
        joined = None if self._master is None else joined_with_master(self._param, self._state)
        return self._param.to(self._dtype) if joined is None else joined

    def put_weights(self, values: Tensor) -> None:
        """Store the parameter, and what it has of further bits."""
        param = self._param
        if values is param:
            return
        if self._master is None:
            self._round_into(param, values, 0, None)
        elif self._master == "float32":
            self._state["master"].copy_(values)
            param.copy_(values.to(param.dtype))
        else:
            bits = 16 if self._master == "split" else 8
            high, low = split(flattened(values, self._order), bits, self._halves(0) if bits == 8 else None)
            param.copy_(unflattened(high, self._order, param.shape))
            self._state["master_low"].copy_(unflattened(low, self._order, param.shape))

    def put_average(self, weight: float) -> None:
        """Average the weights as they are stored now, as torch.lerp."""
        if weight == 0:
            return
        stored, value = self._state["ema"], self.weights()
        average = stored.to(self._dtype)
        of_value = torch.tensor(weight, dtype=average.dtype, device=average.device)
        if weight == 1:
            stored.copy_(value)
        elif of_value < 0.5:
            stored.copy_(average + of_value * (value - average))
        else:
            stored.copy_(value - (value - average) * (1 - of_value))

    def _halves(self, column: int) -> Tensor | None:
        return self._chance.halves(column, self._param) if self._by_chance else None

    def _round_into(self, stored: Tensor, values: Tensor, column: int, form: str | None) -> None:
        """Round values to the dtype in which they are stored, once, to nearest or by chance."""
        if stored.dtype not in (torch.bfloat16, torch.float16):
            stored.copy_(values)
            return
        flat = flattened(narrow(values), self._order)
        form = form or str(stored.dtype).removeprefix("torch.")
        stored.copy_(unflattened(encode(flat, form, self._halves(column)), self._order, self._param.shape))
