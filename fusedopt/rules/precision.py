"""In what form an optimizer keeps what it calculates in float32: of its states, its parameters, and their average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import check_flag, check_number, check_whole_number, did_you_mean, local_of, parameter_name, plain
from .codes import FORMS, coded_bytes, marked_order, order_of_codes
from .masters import low_of, master_of

if TYPE_CHECKING:
    from .rule import Rule

__all__ = ["CARRIED", "PLAIN", "Average", "Precision", "counted_key", "keys_of"]

#: What ``state_dtype`` may be, and ``master``.
_STATE_DTYPES = ("float32", "bfloat16", "float16", "int8")
_MASTERS = ("float32", "split", "split8")

#: Keys of a parameter's state beside those of the rule, in the order in which a hidden count is tied to them.
CARRIED = ("master", "master_low", "ema")

_16_BITS = (torch.bfloat16, torch.float16)

_NOTHING: Mapping[str, Any] = {}


def keys_of(column: str) -> tuple[str, str, str]:
    """The keys under which a column of a rule may be: plain, as a root in float16, and in codes of 8 bits."""
    return column, f"{column}_root", f"{column}_codes"


def counted_key(rule: Rule, entry: Mapping[str, Any]) -> str | None:
    """Which state of a parameter its hidden count is that of: the rule's first column, or else what is carried."""
    candidates = (*keys_of(rule.columns[0].name), *CARRIED)
    return next((key for key in candidates if isinstance(entry.get(key), Tensor)), None)


@dataclass(frozen=True)
class Average:
    """The average of the weights that a step keeps, ``average + weight * (value - average)``.

    A parameter without a gradient takes no step, and its average stays as it is.

    Args:
        decay: what of the average stays at an update, in (0, 1); or None.
        momentum: the weight of the new value, in (0, 1); or None.
        begin: steps before the averaging starts: until then, and at the first update, it is the weights.
        interval: steps from one update to the next.
        gamma: > 0: early weights are larger, ``gamma / (gamma + updates)``; or None.
    """

    decay: float | None = None
    momentum: float | None = None
    begin: int = 0
    interval: int = 1
    gamma: float | None = None

    def __post_init__(self) -> None:
        if (self.decay is None) == (self.momentum is None):
            raise ValueError(
                f"ema: decay={self.decay} and momentum={self.momentum}; expected exactly one of decay and momentum "
                "(= 1 - decay)"
            )
        for name in ("decay", "momentum"):
            value = plain(getattr(self, name))
            if value is not None:
                check_number(f"ema {name}", value, exclusive=True, below=1.0)
                object.__setattr__(self, name, float(value))
        object.__setattr__(self, "begin", check_whole_number("ema begin", self.begin, 0))
        object.__setattr__(self, "interval", check_whole_number("ema interval", self.interval, 1))
        for name in ("begin", "interval"):
            if getattr(self, name) > 2**53:
                raise ValueError(f"Invalid ema {name}: {getattr(self, name)}; expected at most 2^53 steps")
        if self.gamma is not None:
            object.__setattr__(self, "gamma", float(check_number("ema gamma", self.gamma, exclusive=True)))

    @property
    def smallest_weight(self) -> float:
        """The momentum, however it was given."""
        if self.momentum is not None:
            return self.momentum
        assert self.decay is not None
        return 1 - self.decay

    def weight(self, step: int) -> float:
        """Of the new value at step number ``step``, from 1; 0 leaves the average alone."""
        updates = step - 1 - self.begin
        if updates <= 0:
            return 1.0
        if updates % self.interval:
            return 0.0
        return max(self.smallest_weight, self.gamma / (self.gamma + updates) if self.gamma else 0.0)

    def as_dict(self) -> dict[str, Any]:
        """The settings as they may be passed."""
        settings = {"decay": self.decay, "momentum": self.momentum, "gamma": self.gamma}
        given = {key: value for key, value in settings.items() if value is not None}
        return {**given, "begin": self.begin, "interval": self.interval}


@dataclass(frozen=True)
class Precision:
    """In what form an optimizer keeps its states, its parameters and their average. The default is as torch.

    Args:
        state_dtype: names of columns with what was asked for, in the order of the rule's; others are as torch.
        master: what makes 16-bit parameters float32: 'float32', 'split' or 'split8', or None.
        seed: of rounding by chance; None rounds to nearest.
        average: of the weights, or None.
    """

    state_dtype: tuple[tuple[str, str], ...] = ()
    master: str | None = None
    seed: int | None = None
    average: Average | None = None

    @classmethod
    def parse(
        cls,
        rule: Rule,
        state_dtype: Any = None,
        master: Any = None,
        stochastic_rounding: Any = False,
        ema: Any = None,
    ) -> Precision:
        """Validate the four arguments of an optimizer; see :class:`fusedopt.FusedAdam`.

        Args:
            rule: the optimizer's.
            state_dtype: None, one for all states, or a dict of some.
            master: None, 'float32', 'split' or 'split8'.
            stochastic_rounding: True, False, or a dict with ``seed``.
            ema: None, or a dict with the fields of :class:`Average`.

        Raises:
            TypeError: one of another kind.
            ValueError: an unknown name or key, or a number out of range.
        """
        if master is not None and not isinstance(master, str):
            raise TypeError(f"master must be None or one of {', '.join(map(repr, _MASTERS))}, got {master!r}")
        if master is not None and master not in _MASTERS:
            raise ValueError(f"Invalid master: {master!r}; {did_you_mean(master, _MASTERS)}")
        return cls(_parse_state_dtype(rule, state_dtype), master, _parse_seed(stochastic_rounding), _parse_average(ema))

    def with_average(self, average: Average | None) -> Precision:
        """The same, with this average."""
        return replace(self, average=average)

    @property
    def is_plain(self) -> bool:
        """Whether everything is as torch keeps it."""
        return not self.state_dtype and self.master is None and self.seed is None and self.average is None

    def settings(self, rule: Rule) -> dict[str, Any]:
        """The four arguments as they may be passed again: plain values."""
        forms: Any = dict(self.state_dtype)
        if set(forms) == {column.name for column in rule.columns} and len(set(forms.values())) == 1:
            forms = next(iter(forms.values()))
        chance: Any = self.seed is not None
        return {
            "state_dtype": forms or None,
            "master": self.master,
            "stochastic_rounding": {"seed": self.seed} if self.seed else chance,
            "ema": None if self.average is None else self.average.as_dict(),
        }

    def form_of(self, rule: Rule, column: str) -> str | None:
        """The form of a state of the rule, one of :data:`fusedopt.rules.codes.FORMS`; None for that of torch."""
        asked = dict(self.state_dtype).get(column)
        if asked is None:
            return None
        if any(each.squares for each in rule.columns if each.name == column):
            return {"float16": "float16_root", "int8": "int8_unsigned"}.get(asked, asked)
        return asked

    def key_of(self, rule: Rule, column: str) -> str:
        """The key in ``optimizer.state[param]`` of a state of the rule."""
        form = self.form_of(rule, column)
        plain_key, root, codes = keys_of(column)
        return codes if form in ("int8", "int8_unsigned") else root if form == "float16_root" else plain_key

    def draws(self, rule: Rule) -> bool:
        """Whether something is rounded by chance: where that was asked for, and codes of means of squares always."""
        return self.seed is not None or any(self.form_of(rule, name) == "int8_unsigned" for name, _ in self.state_dtype)

    def masters(self, param: Tensor) -> bool:
        """Whether this parameter has more bits than its own dtype has."""
        return self.master is not None and param.dtype in _16_BITS

    @property
    def master_key(self) -> str | None:
        """The key in ``optimizer.state[param]`` of what makes a 16-bit parameter a float32, or None."""
        return {None: None, "float32": "master"}.get(self.master, "master_low")

    def carried_keys(self, param: Tensor) -> list[str]:
        """The keys in ``optimizer.state[param]`` beside those of the rule's states."""
        keys = [self.master_key] if self.master_key is not None and self.masters(param) else []
        return keys if self.average is None else [*keys, "ema"]

    def new_state(self, rule: Rule, param: Tensor, key: str, entry: Mapping[str, Any] = _NOTHING) -> Tensor:
        """What stands at a key of the state of a parameter that has not stepped.

        Args:
            rule: the optimizer's.
            param: the parameter.
            key: one of those that :meth:`Rule.needed_keys` gives.
            entry: what is in its state already.
        """
        param = param.detach()
        if key in ("master", "ema"):
            return master_of(param, entry)
        if key == "master_low":
            stored = torch.zeros_like(param, dtype=torch.int16 if self.master == "split" else torch.uint8)
            if isinstance(master := entry.get("master"), Tensor):
                low = low_of(local_of(param), "master", local_of(master), stored.dtype)
                local_of(stored).copy_(torch.zeros_like(local_of(stored)) if low is None else low)
            return stored
        column = next(each.name for each in rule.columns if key in keys_of(each.name))
        form = self.form_of(rule, column)
        if key.endswith("_codes"):
            local = local_of(param)
            return torch.zeros(coded_bytes(local.numel()), dtype=torch.uint8, device=local.device)
        dtype = param.dtype if form is None else FORMS[form]
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def problem_at(self, param: Tensor, key: str, stored: Tensor) -> str | None:
        """Why a tensor at a key of the state cannot be what stands there, as the end of a sentence, or None.

        Plain states, which may be of any dtype, are not looked at.
        """
        if key.endswith("_codes"):
            expected = (coded_bytes(local_of(param).numel()),)
            if stored.dtype != torch.uint8 or tuple(stored.shape) != expected or not stored.is_contiguous():
                return f"is {stored.dtype} of shape {tuple(stored.shape)}; expected torch.uint8 of shape {expected}"
            if marked_order(local_of(param), stored) != order_of_codes(local_of(param)):
                return (
                    "has codes in the order that the parameter's strides made before its memory format was changed; "
                    "change it before the first step, or load the optimizer's state dict again"
                )
            return None
        dtypes: tuple[torch.dtype, ...] = ()
        if key == "master":
            dtypes = (torch.float32,)
        elif key == "master_low":
            dtypes = (torch.int16 if self.master == "split" else torch.uint8,)
        elif key == "ema":
            dtypes = (torch.float32, torch.float64)  # the other where a model was made that in training
        elif key.endswith("_root"):
            dtypes = (torch.float16,)
        if dtypes and (stored.dtype not in dtypes or stored.shape != param.shape):
            return f"is {stored.dtype} of shape {tuple(stored.shape)}; expected {dtypes[0]} of {tuple(param.shape)}"
        return None

    def refusal(self, rule: Rule, group: Mapping[str, Any], param: Tensor) -> str | None:
        """Why a parameter cannot be kept so, as the end of a sentence, or None."""
        if self.master in ("split", "split8") and param.dtype == torch.float16:
            return (
                f"is float16, and master={self.master!r} makes a float32 of a bfloat16; expected master='float32', or "
                "bfloat16 parameters"
            )
        if self.seed is None or not rule.hides_step or param.dtype not in _16_BITS:
            return None
        if not rule.needed_columns(group) and not self.carried_keys(param):
            return (
                "has no state: stochastic_rounding counts steps, which SGD without momentum and without a master or "
                "ema does not; expected momentum > 0, a master, ema, or stochastic_rounding=False"
            )
        return None

    def check_group(self, rule: Rule, group: Mapping[str, Any], number: int) -> None:
        """Raise ValueError where a parameter of a group cannot be kept so."""
        for index, param in enumerate(group["params"]):
            if (reason := self.refusal(rule, group, param)) is not None:
                raise ValueError(f"{parameter_name(group, number, index)} {reason}")

    def check(self, rule: Rule, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Check the settings against the parameters of a new optimizer.

        Raises:
            ValueError: a parameter cannot be kept so, or there is none that a setting is for.
        """
        if self.is_plain:
            return
        for number, group in enumerate(param_groups):
            self.check_group(rule, group, number)
        params = [param for group in param_groups for param in group["params"]]
        dtypes = ", ".join(sorted({str(param.dtype).removeprefix("torch.") for param in params})) or "none"
        if self.master is not None and not any(map(self.masters, params)):
            raise ValueError(
                f"master={self.master!r} is for bfloat16 and float16 parameters, and those of this optimizer are "
                f"{dtypes}; expected master=None, or a model in 16 bits"
            )
        if self.seed is not None and not any(self._rounded_by_chance(rule, param_groups)):
            raise ValueError(
                f"stochastic_rounding: nothing is rounded to 16 or 8 bits here: parameters are {dtypes}, "
                f"state_dtype={self.settings(rule)['state_dtype']!r} and master={self.master!r}; expected 16-bit "
                "parameters without a master, states in 16 or 8 bits, master='split8', or stochastic_rounding=False"
            )
        if self.average is not None and not any(param.requires_grad for param in params):
            raise ValueError("ema: no parameter of this optimizer requires grad, so no step would average anything")

    def _rounded_by_chance(self, rule: Rule, param_groups: Sequence[Mapping[str, Any]]) -> Iterator[bool]:
        for group in param_groups:
            columns = rule.needed_columns(group)
            for param in group["params"]:
                is_small = param.dtype in _16_BITS
                yield is_small and (self.master is None or self.master == "split8")
                forms = [self.form_of(rule, column) for column in columns]
                yield any(is_small if form is None else form != "float32" for form in forms)


def _parse_state_dtype(rule: Rule, state_dtype: Any) -> tuple[tuple[str, str], ...]:
    if state_dtype is None:
        return ()
    columns = [column.name for column in rule.columns]
    if not isinstance(state_dtype, Mapping):
        asked = dict.fromkeys(columns, _name_of(state_dtype, "state_dtype"))
    else:
        for name in state_dtype:
            if name not in columns:
                raise ValueError(f"state_dtype: unknown state {name!r}; {did_you_mean(str(name), columns)}")
        given = {name: value for name, value in state_dtype.items() if value is not None}
        asked = {name: _name_of(value, f"state_dtype[{name!r}]") for name, value in given.items()}
    # What only grows never forgets what rounding has added to it.
    coarse = {column.name for column in rule.columns if column.only_grows and asked.get(column.name) == "int8"}
    if coarse and isinstance(state_dtype, Mapping):
        name = min(coarse)
        raise ValueError(
            f"state_dtype[{name!r}]: a maximum would grow by rounding in 'int8'; expected 'bfloat16' or more"
        )
    asked |= dict.fromkeys(coarse, "bfloat16")
    return tuple((name, asked[name]) for name in columns if name in asked)


def _name_of(value: Any, what: str) -> str:
    """The name of a dtype, given as that or as a torch.dtype."""
    if not isinstance(value, (str, torch.dtype)):
        raise TypeError(f"{what} must be the name of a dtype, a torch.dtype, a dict of these or None, got {value!r}")
    name = str(value).removeprefix("torch.")
    if name not in _STATE_DTYPES:
        raise ValueError(f"Invalid {what}: {value!r}; {did_you_mean(name, _STATE_DTYPES)}")
    return name


def _parse_seed(stochastic_rounding: Any) -> int | None:
    if not isinstance(stochastic_rounding, Mapping):
        try:
            return 0 if check_flag("stochastic_rounding", stochastic_rounding) else None
        except TypeError:
            raise TypeError(
                f"stochastic_rounding must be True, False or dict(seed=...), got {stochastic_rounding!r}"
            ) from None
    for key in stochastic_rounding:
        if key != "seed":
            raise ValueError(f"stochastic_rounding: unknown key {key!r}; expected 'seed'")
    seed = stochastic_rounding.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(plain(seed), int):
        raise TypeError(f"Invalid stochastic_rounding seed: {seed!r}; expected a whole number")
    if not 0 <= plain(seed) < 2**64:
        raise ValueError(f"Invalid stochastic_rounding seed: {seed!r}; expected a whole number in [0, 2^64)")
    return int(plain(seed))


def _parse_average(ema: Any) -> Average | None:
    if ema is None or isinstance(ema, Average):
        return ema
    if not isinstance(ema, Mapping):
        raise TypeError(f"ema must be a dict or None, got {type(ema).__name__}")
    fields = list(Average.__dataclass_fields__)
    for key in ema:
        if key not in fields:
            raise ValueError(f"ema: unknown key {key!r}; {did_you_mean(str(key), fields)}")
    return Average(**ema)


#: Everything as torch keeps it.
PLAIN = Precision()
