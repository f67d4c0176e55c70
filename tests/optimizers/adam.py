"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fusedopt
from optimizers import Value

OPTIONS = {
    "adam": (fusedopt.FusedAdam, {"lr": 0.01}),
    "adam-decay": (fusedopt.FusedAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": (fusedopt.FusedAdam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adam-decoupled": (fusedopt.FusedAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-beta0": (fusedopt.FusedAdam, {"lr": 0.01, "betas": (0.0, 0.999), "eps": 1e-6}),
    "adamw": (fusedopt.FusedAdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad-maximize": (fusedopt.FusedAdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adamw-tensor-lr": (fusedopt.FusedAdamW, {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    "adamw-tensor-betas": (fusedopt.FusedAdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
}
SHORT = ("adam-amsgrad", "adamw")
MATTERS = (
    {"lr": 0.125, "betas": (0.5, 0.625), "eps": 0.015625, "weight_decay": 0.25},
    [
        ("lr", 0.25),
        ("betas", (0.75, 0.625)),
        ("betas", (0.5, 0.75)),
        ("eps", 0.03125),
        ("weight_decay", 0.5),
        ("amsgrad", True),
        ("maximize", True),
        ("decoupled_weight_decay", True),
    ],
)


def formula(
    group: dict[str, Any], p: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int
) -> dict[str, Value]:
    lr, (b1, b2), eps = float(group["lr"]), map(float, group["betas"]), group["eps"]
    decay = float(group["weight_decay"])
    g = -g if group["maximize"] else g
    g_magnitude = np.abs(g)
    shrunk = p
    if group["decoupled_weight_decay"]:
        shrunk = p * (1 - lr * decay)
    else:
        g_magnitude = g_magnitude + decay * np.abs(p)
        g = g + decay * p
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
    m_magnitude = b1 * np.abs(state["exp_avg"]) + (1 - b1) * g_magnitude
    v_magnitude = b2 * np.abs(state["exp_avg_sq"]) + (1 - b2) * g_magnitude**2
    results = {"exp_avg": Value(m, m_magnitude), "exp_avg_sq": Value(v, v_magnitude)}
    if group["amsgrad"]:
        v = np.maximum(v, state["max_exp_avg_sq"])
        v_magnitude = np.maximum(v_magnitude, v)
        results["max_exp_avg_sq"] = Value(v, v_magnitude)
    denom = np.sqrt(v / (1 - b2**t)) + eps
    move = lr / (1 - b1**t) * m / denom
    # A cancelled second moment is relatively inexact, and so is what is divided by its root.
    inexact = np.sqrt(np.divide(v_magnitude, v, out=np.ones_like(v), where=v > 0))
    results["param"] = Value(shrunk - move, np.abs(p) + lr / (1 - b1**t) * m_magnitude / denom * inexact)
    return results
