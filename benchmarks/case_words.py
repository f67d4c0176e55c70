"""Names of cases and contenders in words, for pictures and for pages that others than developers read."""

from __future__ import annotations

from fusedopt.bench import Case
from fusedopt.bench.cases import OPTIMIZERS
from fusedopt.bench.contenders import OURS, RIVAL

__all__ = ["CONTENDERS", "RECIPES", "WORKLOADS", "parameters", "step"]

CONTENDERS = {
    OURS: "fusedopt",
    RIVAL: "torch fused",
    "torch-merged": "torch fused, equal groups merged by hand",
    "torch-grad-scale": "torch fused, scale and clipping as one divisor",
}
RECIPES = {
    "bare": "bare step",
    "clip": "clip",
    "amp": "AMP",
    "amp-clip": "AMP + clip",
    "amp-clip-accumulate": "AMP + clip, 4 micro-batches",
}
GROUPINGS = {"one": "one group", "two": "two groups", "each": "a group for each"}
WORKLOADS = {
    "64x1Mi": "64 x 1Mi",
    "vit-b": "ViT-B",
    "vit-l": "ViT-L",
    "vit-tiny": "ViT-tiny",
    "resnet-50": "ResNet-50",
    "convnext-b": "ConvNeXt-B",
    "biggan-128": "BigGAN-128",
    "gpt2-124m": "GPT-2 124M",
    "llama-1b": "Llama 1B",
    "400x64": "400 x 64",
    "10000x64": "10,000 x 64",
    "ragged": "odd sizes",
}


def step(case: Case) -> str:
    """The optimizer and what its step has to do, as in ``AdamW, AMP + clip``; a dtype that is not float32."""
    dtype = "" if case.dtype == "fp32" else f", {case.dtype}"
    return f"{OPTIMIZERS[case.optimizer].name}, {RECIPES[case.recipe]}{dtype}"


def parameters(case: Case) -> str:
    """The parameters and their groups, as in ``ViT-B, a group for each``."""
    return f"{WORKLOADS.get(case.workload, case.workload)}, {GROUPINGS[case.grouping]}"
