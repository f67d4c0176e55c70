"""SGD with momentum."""

from __future__ import annotations

from typing import Any

import numpy as np

import fusedopt
from optimizers import Value

OPTIONS = {
    "sgd": (fusedopt.FusedSGD, {"lr": 0.1}),
    "sgd-decay": (fusedopt.FusedSGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-momentum": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
}
SHORT = ("sgd-nesterov",)
MATTERS = (
    {"lr": 0.125, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.25},
    [
        ("lr", 0.25),
        ("momentum", 0.75),
        ("dampening", 0.125),
        ("weight_decay", 0.5),
        ("nesterov", True),
        ("maximize", True),
    ],
)


def formula(
    group: dict[str, Any], p: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int
) -> dict[str, Value]:
    lr, momentum, dampening = float(group["lr"]), group["momentum"], group["dampening"]
    decay = float(group["weight_decay"])
    g = -g if group["maximize"] else g
    magnitude = np.abs(g) + decay * np.abs(p)
    g = g + decay * p
    results = {}
    if momentum:
        buffer = g if t == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * g
        before = 0 if t == 1 else momentum * np.abs(state["momentum_buffer"])
        b_magnitude = before + abs(1 - dampening if t > 1 else 1) * magnitude
        results["momentum_buffer"] = Value(buffer, b_magnitude)
        if group["nesterov"]:
            g, magnitude = g + momentum * buffer, magnitude + momentum * b_magnitude
        else:
            g, magnitude = buffer, b_magnitude
    results["param"] = Value(p - lr * g, np.abs(p) + lr * magnitude)
    return results
