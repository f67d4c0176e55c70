"""A look at an installed wheel, from any folder: the native backend serves, and agrees with torch's optimizers.

`python .ci/smoke_wheel.py`; exits with 1 and says why when something is wrong.
"""

import sys
from pathlib import Path

# The package that is installed, and not the one of the clone.
sys.path[:] = [entry for entry in sys.path if entry and not (Path(entry) / "csrc").is_dir()]

import torch  # noqa: E402

import fusedopt  # noqa: E402
from fusedopt.cli.info import info  # noqa: E402


def trained(optimizer_of, steps: int = 5) -> list[torch.Tensor]:
    """The parameters of a small model after a few steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(37, 300), torch.nn.Tanh(), torch.nn.Linear(300, 11))
    optimizer = optimizer_of(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 37)).square().mean().backward()
        optimizer.step()
    # Torch's own optimizers have no backend.
    assert getattr(optimizer, "backend_in_use", "native") == "native"
    return [param.detach() for param in model.parameters()]


print(info())
for fused, plain, settings in (
    (fusedopt.FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (fusedopt.FusedAdam, torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    (fusedopt.FusedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
):
    ours = trained(lambda params, fused=fused, settings=settings: fused(params, **settings))
    theirs = trained(lambda params, plain=plain, settings=settings: plain(params, **settings))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    print(f"{fused.__name__}: as {plain.__name__}")
print(f"{fusedopt._C.__file__}: good")
