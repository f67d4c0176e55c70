"""How the kernels' accesses lie in memory, counted on nvcc's PTX: a warp's request touches no sector in vain.

A GPU moves memory in sectors of 32 bytes. A warp that loads 16 bytes per lane, side by side, touches 16 sectors; if its
lanes lie 32 bytes apart it touches 32, half of each for nothing.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import ptx_code
import pytest
import torch
from cases import HAS_EMULATOR, OPTIONS, bits, module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1"),
    pytest.mark.skipif("90" not in ptx_code.known_architectures(), reason="no nvcc here that knows sm_90"),
]

emulator: Any = getattr(module, "emulator", None)
ptx: Any = getattr(module, "ptx", None)

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BRAIN, HALF)
OPTION_NAMES = ("sgd-momentum", "adamw", "adam-amsgrad")
#: Sectors that a request needs, by bytes of a lane, and what alignment to less than a sector may add.
NEEDED = {16: 16, 8: 8}
SLACK = {16: 2, 8: 1}


def one_step(option: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, backend: str) -> list[bytes]:
    """A step with columns of these dtypes; the bits of the parameter and its state."""
    cls, settings = OPTIONS[option]
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(8192, generator=generator).to(param))
    optimizer = cls([parameter], **settings, clip_grad={"max_norm": 1e9}, backend=backend)
    if grad != param:
        parameter.grad_dtype = None
    parameter.grad = torch.randn(8192, generator=generator).to(grad)
    optimizer.step()
    for name, value in optimizer.state[parameter].items():
        if name != "step":
            optimizer.state[parameter][name] = value.to(state)
    if HAS_EMULATOR:
        ptx.reset_counts()
    optimizer.step()
    return bits([parameter, *(value for name, value in optimizer.state[parameter].items() if name != "step")])


def most_sectors() -> dict[str, int]:
    """The most sectors of global memory that a warp touched at once, by kernel and kind of access."""
    return {
        f"{kernel} {kind}": most
        for kernel, found in ptx.counts().items()
        for kind, (_, _, most) in found["accesses"].items()
        if ("update" in kernel or "statistics" in kernel) and ".global." in kind
        if int(kind.rpartition(".")[2]) in NEEDED
    }


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_no_sector_is_touched_in_vain(option: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> None:
    emulator.use_ptx(ptx_code.nvcc_modules("90"))
    found = one_step(option, param, grad, state, "emulated")
    counted = most_sectors()
    assert any("update" in name for name in counted), counted
    for name, most in counted.items():
        lane = int(name.rpartition(".")[2])
        assert most <= NEEDED[lane] + SLACK[lane], (name, most)
    emulator.use_ptx([])
    assert found == one_step(option, param, grad, state, "native")


def main() -> None:
    """Print the figures of every combination."""
    emulator.use_ptx(ptx_code.nvcc_modules("90"))
    for option, *dtypes in itertools.product(OPTION_NAMES, DTYPES, DTYPES, DTYPES):
        one_step(option, *dtypes, "emulated")
        update = {name.split()[1]: most for name, most in most_sectors().items() if "update" in name}
        print(option, *(str(dtype).removeprefix("torch.") for dtype in dtypes), json.dumps(update))


if __name__ == "__main__":
    main()
