"""In what form an optimizer keeps its state: the settings as attributes, and their check against parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..messages import is_dtensor, parameter_name
from ..rules import Precision, Rule
from ..shards import numbers_of

__all__ = ["check_kept", "setting_of_precision"]


def setting_of_precision(name: str) -> Any:
    """A read-only attribute of an optimizer: the setting as it may be passed again."""

    def get(optimizer: Any) -> Any:
        return optimizer._precision.settings(optimizer.rule)[name]

    return property(get, doc=f"The ``{name}`` that the optimizer was made with, as it may be passed again; read-only.")


def check_kept(rule: Rule, precision: Precision, group: Mapping[str, Any], number: int) -> None:
    """Check the settings of an optimizer against the parameters of one group.

    Args:
        rule: the optimizer's.
        precision: its settings.
        group: of its parameters.
        number: of the group.

    Raises:
        ValueError: a parameter cannot be kept so; or is dealt out such that nobody knows the numbers of its elements.
    """
    precision.check_group(rule, group, number)
    for index, param in enumerate(group["params"] if precision.draws(rule) else ()):
        if is_dtensor(param):
            try:
                numbers_of(param)
            except ValueError as error:
                raise ValueError(f"{parameter_name(group, number, index)} {error}") from None
