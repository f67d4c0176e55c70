"""From one form of state to another: for loading, saving, and taking state over.

Note [Conversion]: a state dict may be of an optimizer with another precision, or of torch's. What is in another form is
rounded to nearest once and kept so from there on; without a state_dtype, what is narrower than the parameter is made as
wide, since it would stay narrow for ever. What no entry has begins anew: a master as its parameter, and an
average as the weights. What some entries have and one lacks is missing there, and an error: see Note [Half a state].
What is left out or converted is said in one warning, unless it is what a state dict decodes, and nothing is lost.

Nothing of it depends on the weights, which may be loaded into the model before or after. So an average that begins is
None until the first step, and a master in another form stays in it until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..messages import deal_out_as, dealt_out_alike, is_dtensor, local_of
from ..messages.tensors import unsupported_kind
from ..rules import CARRIED, Precision, Rule, StateColumn, keys_of
from ..rules.codes import (
    FORMS,
    canonical_order,
    coded_bytes,
    decode,
    encode,
    encode_again,
    flattened,
    marked_order,
    narrow,
    order_of_codes,
    unflattened,
)
from ..rules.masters import low_of

__all__ = ["CODES_ORDER", "CODES_SHAPE", "Conversion", "plain_values"]

#: In a state dict: the dimensions by strides that codes are in the order of, where it is not that of the dimensions.
CODES_ORDER = "codes_order"
#: In a state dict: the shape of the parameter whose codes these are, which their bytes do not tell.
CODES_SHAPE = "codes_shape"


def _new(param: Tensor, dtype: torch.dtype) -> Any:
    """An empty tensor as a parameter is, dealt out as it."""
    return torch.empty_like(param.detach(), dtype=dtype, requires_grad=False)


def _other_dtype(param: Tensor, stored: Tensor, form: str | None) -> bool:
    """Whether a plain state is in a dtype that is not kept; as torch has it, a wider one than the parameter's is."""
    if form is not None:
        return stored.dtype != FORMS[form]
    return stored.is_floating_point() and stored.dtype.itemsize < param.dtype.itemsize


def plain_values(column: StateColumn, param: Tensor, key: str, stored: Any, order: Any = None) -> Tensor:
    """The values of a state of the rule in plain floating point, of the parameter's shape and dealt out as it.

    Args:
        column: which.
        param: whose.
        key: where it stood, which tells its form; :meth:`Precision.problem_at` had nothing against it.
        stored: the tensor, on the parameter's device.
        order: that of codes, as :func:`fusedopt.rules.codes.order_of_codes`; by default what they are marked with.
    """
    if key == column.name:
        return deal_out_as(param, stored)
    if key.endswith("_root"):
        return deal_out_as(param, stored).float().square()
    values, local = _new(param, torch.float32), local_of(param)
    order = marked_order(local, stored) if order is None else order
    dims = [*order, *(d for d in canonical_order(local) if d not in order)]
    form = column.form_at(key)
    assert form is not None
    local_of(values).copy_(unflattened(decode(stored, form, local.numel()), dims, local.shape))
    return values


def _in_form(param: Tensor, values: Tensor, form: str | None) -> Tensor:
    """Values of a parameter's shape, dealt out as it, in the form in which they are kept."""
    if form in ("int8", "int8_unsigned"):
        local = local_of(param)
        return encode_again(flattened(local_of(values), canonical_order(local)).float(), form)
    stored = _new(param, param.dtype if form is None else FORMS[form])
    mine, given = local_of(stored), local_of(values)
    if form == "float16_root":
        mine.copy_(encode(given.float(), form))
    else:
        mine.copy_(narrow(given) if mine.dtype in (torch.bfloat16, torch.float16) else given)
    return stored


def _says_the_same(column: StateColumn, param: Tensor, key: str, kept: Tensor, values: Tensor) -> bool:
    """Whether values have lost nothing in the form in which they are kept: those that were decoded for a state dict."""
    again = local_of(plain_values(column, param, key, kept))
    return bool(torch.equal(again, local_of(values).to(again.dtype)))


class Conversion:
    """Of the states of one optimizer, to the form in which another keeps them.

    Args:
        rule: the optimizer's that gets them.
        precision: its settings.
        entries: all that it gets, of which some may be of other parameters.
        what: the start of errors about a state.
    """

    def __init__(self, rule: Rule, precision: Precision, entries: Iterable[Any], what: str = "loaded state"):
        self._rule = rule
        self._precision = precision
        self._what = what
        known = [entry for entry in entries if isinstance(entry, Mapping)]
        there = {key for entry in known for key in CARRIED if isinstance(entry.get(key), Tensor)}
        self._no_master = not there & {"master", "master_low"}
        self._no_average = "ema" not in there
        self._columns: dict[str, tuple[str, str]] = {}
        self._remarks: dict[str, None] = {}

    def converted(self, param: Tensor, name: str, entry: Any) -> Any:
        """The state of one parameter; neither it nor its tensors are changed.

        Args:
            param: the parameter.
            name: what messages call it.
            entry: its state, without what is None.

        Raises:
            ValueError: a state in another form is not what stands there, or cannot be kept in this optimizer's.
        """
        if not isinstance(entry, Mapping):
            return entry
        columns = {column: [key for key in keys_of(column.name) if key in entry] for column in self._rule.columns}
        if not any(columns.values()) and not any(key in entry for key in CARRIED):
            return entry
        entry = dict(entry)
        order, shape = entry.pop(CODES_ORDER, None), entry.pop(CODES_SHAPE, None)
        if shape is not None and shape != list(local_of(param).shape):
            expected = list(local_of(param).shape)
            raise ValueError(f"{self._what} {CODES_SHAPE!r} of {name} is {shape!r:.80}; expected {expected}")
        natural = sorted(order_of_codes(local_of(param)))
        if order is not None and sorted(order) != natural:
            raise ValueError(f"{self._what} {CODES_ORDER!r} of {name} is {order!r}; expected an order of {natural}")
        order = natural if order is None else list(order)
        for column, keys in columns.items():
            if len(keys) > 1:
                raise ValueError(
                    f"{self._what} of {name} has {' and '.join(map(repr, keys))}, which is one state in two forms"
                )
            if keys:
                self._convert_column(column, keys[0], param, name, entry, order)
        self._convert_master(param, name, entry)
        self._convert_average(param, name, entry)
        return entry

    def remark(self) -> str | None:
        """What was converted, for a warning, or None."""
        parts = []
        if self._columns:
            was = ", ".join(f"{name} ({before})" for name, (before, _) in self._columns.items())
            kept = [after for _, after in self._columns.values()]
            kept = kept[:1] if len(set(kept)) == 1 else kept
            parts.append(f"loaded {was} {'is' if len(self._columns) == 1 else 'are'} kept as {', '.join(kept)} here")
        parts += self._remarks
        return f"fusedopt: {'; '.join(parts)}" if parts else None

    def _problem(self, name: str, key: str, problem: str | None) -> None:
        if problem is not None:
            raise ValueError(f"{self._what} {key!r} of {name} {problem}")

    def _check(self, param: Tensor, name: str, key: str, value: Any, *dtypes: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape, on its device and dealt out as it."""
        if not isinstance(value, Tensor):
            raise ValueError(f"{self._what} {key!r} of {name} is {value!s:.80}; expected a tensor")
        if dtypes and value.dtype not in dtypes:
            self._problem(name, key, f"has dtype {value.dtype}; expected {' or '.join(map(str, dtypes))}")
        if not dtypes:
            self._problem(name, key, unsupported_kind(value))
        if value.shape != param.shape:
            self._problem(name, key, f"has shape {tuple(value.shape)}, expected {tuple(param.shape)}")
        value = value.detach().to(param.device)
        if dealt_out_alike(param, value):
            return value
        try:
            return deal_out_as(param, value)
        except Exception as error:  # torch cannot cut some uneven shards, and says so in many ways
            raise ValueError(f"{self._what} {key!r} of {name} cannot be dealt out as the parameter: {error}") from error

    def _convert_column(
        self, column: StateColumn, key: str, param: Tensor, name: str, entry: dict[Any, Any], order: list[int]
    ) -> None:
        rule, precision = self._rule, self._precision
        wanted, form = precision.key_of(rule, column.name), precision.form_of(rule, column.name)
        stored, is_coded = entry[key], key.endswith("_codes")
        if key == column.name:
            is_kept = key == wanted and not (isinstance(stored, Tensor) and _other_dtype(param, stored, form))
        else:
            is_kept = key == wanted and not (is_coded and order != order_of_codes(local_of(param)))
        if is_kept:
            return
        if is_coded:
            expected = (coded_bytes(local_of(param).numel()),)
            if not isinstance(stored, Tensor):
                self._problem(name, key, f"is {stored!s:.80}; expected a tensor")
            if is_dtensor(stored) or stored.dtype != torch.uint8 or tuple(stored.shape) != expected:
                self._problem(
                    name,
                    key,
                    f"is {stored.dtype} of shape {tuple(stored.shape)}; expected torch.uint8 of shape {expected}",
                )
            stored = stored.detach().to(param.device).contiguous()
        else:
            stored = self._check(param, name, key, stored, *(() if key == column.name else (torch.float16,)))
        values = plain_values(column, param, key, stored, order)
        kept = _in_form(param, values, form)
        if kept.dtype == torch.float16:
            self._check_range(param, name, key, values, kept)
        del entry[key]
        entry[wanted] = kept
        before = "int8" if is_coded else str(stored.dtype).removeprefix("torch.")
        after = dict(precision.state_dtype).get(column.name) or str(param.dtype).removeprefix("torch.")
        if key == wanted and stored.dtype == kept.dtype:
            self._remarks["codes are made anew for another memory format"] = None
        elif key != column.name or wanted == key or not _says_the_same(column, param, wanted, kept, values):
            self._columns.setdefault(column.name, (before, after))

    def _check_range(self, param: Tensor, name: str, key: str, values: Tensor, kept: Tensor) -> None:
        if bool((local_of(kept).isinf() & local_of(values).isfinite()).any()):
            self._problem(name, key, "has values beyond those of float16; expected state_dtype 'bfloat16' or 'float32'")

    def _convert_master(self, param: Tensor, name: str, entry: dict[Any, Any]) -> None:
        precision = self._precision
        there = [key for key in ("master", "master_low") if key in entry]
        if len(there) > 1:
            raise ValueError(f"{self._what} of {name} has 'master' and 'master_low', which is one state in two forms")
        wanted = precision.master_key if precision.masters(param) else None
        if wanted is None:
            if there:
                del entry[there[0]]
                self._remarks["the loaded master is left out, and weights go on as the parameters have them"] = None
            return
        if not there:
            if self._no_master:
                entry[wanted] = precision.new_state(self._rule, param, wanted)
                self._remarks["the loaded state has no master, which begins as the parameters"] = None
            return
        (key,) = there
        value = entry[key]
        if key == "master":
            stored = self._check(param, name, key, value, torch.float32)
        else:
            stored = self._check(param, name, key, value, torch.int16, torch.uint8)
        dtype = torch.int16 if precision.master == "split" else torch.uint8
        if key == wanted and (key == "master" or stored.dtype == dtype):
            return
        if key == wanted:
            low = low_of(local_of(param.detach()), key, local_of(stored), dtype)
            assert low is not None
            entry[key] = _new(param, dtype)
            local_of(entry[key]).copy_(low)
        else:
            entry[key] = stored
        if key == "master" and (dtype == torch.int16 or not bool((local_of(stored).view(torch.int32) & 0xFF).any())):
            return  # nothing is lost
        was = "float32" if key == "master" else "split" if stored.dtype == torch.int16 else "split8"
        self._remarks[f"the loaded master ({was}) is kept as {precision.master!r}"] = None

    def _convert_average(self, param: Tensor, name: str, entry: dict[Any, Any]) -> None:
        if self._precision.average is None:
            if "ema" in entry and isinstance(entry["ema"], Tensor):
                del entry["ema"]
                self._remarks["the loaded ema is left out"] = None
            return
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        if "ema" not in entry:
            if self._no_average:
                entry["ema"] = None
                self._remarks["the loaded state has no ema: the average begins with the weights"] = None
        elif not isinstance(entry["ema"], Tensor) or entry["ema"].dtype != dtype:
            entry["ema"] = self._check(param, name, "ema", entry["ema"]).to(dtype)
