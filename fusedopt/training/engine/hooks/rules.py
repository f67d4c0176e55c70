"""Whether a greater or a smaller value of a metric is better."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["GREATER_KEYS", "LESS_KEYS", "RULES", "rule_of"]

RULES = ("greater", "less")
#: Names, or parts of names, of metrics for which greater is better, as in MMEngine.
GREATER_KEYS = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
LESS_KEYS = ("loss",)


def rule_of(
    setting: str, metric: str, greater_keys: Iterable[str] = GREATER_KEYS, less_keys: Iterable[str] = LESS_KEYS
) -> str:
    """``'greater'`` or ``'less'``, by the name of a metric: the whole name first, then its parts.

    Args:
        setting: the argument that names the metric, for the error.
        metric: its name.
        greater_keys: names, or parts of names, for which greater is better.
        less_keys: likewise for less.

    Raises:
        ValueError: the name does not say.
    """
    name = metric.lower()
    keys = {"greater": [key.lower() for key in greater_keys], "less": [key.lower() for key in less_keys]}
    for rule in RULES:
        if name in keys[rule]:
            return rule
    for rule in RULES:
        if any(key in name for key in keys[rule]):
            return rule
    raise ValueError(f"{setting}={metric!r}: its name does not say whether greater or less is better; set rule")
