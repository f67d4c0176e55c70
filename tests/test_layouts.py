"""Memory layouts: any order, misaligned, strided with holes, gradients laid out otherwise than their parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import backend_name, bits, each_backend, each_dtype, global_norm
from oracle import CheckedStep
from torch import nn

import fusedopt


def misaligned(tensor: torch.Tensor, offset: int = 1) -> torch.Tensor:
    """A copy that starts ``offset`` elements into its storage, as views into a DDP bucket do."""
    bucket = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    view = bucket[offset:].view(tensor.shape)
    view.copy_(tensor)
    return view


SHAPES: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "misaligned": misaligned,
    "every other column": lambda x: torch.cat([x, x], -1)[..., ::2].copy_(x),
    "inner slice": lambda x: torch.cat([x, x], 1)[:, 2 : 2 + x.shape[1]].copy_(x),
}


@each_dtype
@each_backend
@pytest.mark.parametrize("grad_layout", SHAPES)
@pytest.mark.parametrize("param_layout", SHAPES)
def test_every_layout_of_parameter_and_gradient(
    param_layout: str, grad_layout: str, backend: str, dtype: torch.dtype
) -> None:
    values = torch.randn(6, 8, 5, 7).to(dtype)
    param = nn.Parameter(SHAPES[param_layout](values.clone()))
    assert torch.equal(param, values)
    optimizer = fusedopt.FusedAdamW([param], lr=0.01, clip_grad={"max_norm": 1.0}, backend=backend_name(backend))
    for _ in range(2):
        param.grad = SHAPES[grad_layout](torch.randn(6, 8, 5, 7).to(dtype))
        check = CheckedStep(optimizer, min(1.0, 1.0 / (global_norm([param]) + 1e-6)))
        optimizer.step()
        check.check()


@each_backend
def test_elements_between_a_strided_parameters_are_not_touched(backend: str) -> None:
    storage = torch.arange(40.0)
    param = nn.Parameter(storage[::2])
    param.grad = torch.ones(20)
    fusedopt.FusedSGD([param], lr=1.0, backend=backend_name(backend)).step()
    assert storage[1::2].tolist() == [float(x) for x in range(1, 40, 2)]
    assert storage[::2].tolist() == [float(x - 1) for x in range(0, 40, 2)]


@each_backend
@pytest.mark.parametrize("offset", range(1, 9))
def test_columns_may_be_misaligned_to_each_other(offset: int, backend: str) -> None:
    values = torch.randn(1000)
    param = nn.Parameter(misaligned(values, offset))
    optimizer = fusedopt.FusedAdamW([param], lr=0.01, backend=backend_name(backend))
    for step in range(2):
        param.grad = misaligned(torch.randn(1000), (3 * offset + step) % 8)
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()
        optimizer.state[param]["exp_avg"] = misaligned(optimizer.state[param]["exp_avg"], (5 * offset) % 8)


@each_backend
def test_size_one_dimensions_may_have_any_stride(backend: str) -> None:
    """pytorch#106951."""
    param = nn.Parameter(torch.randn(5, 1, 3))
    param.grad = torch.as_strided(torch.randn(15), (5, 1, 3), (3, 77, 1))
    optimizer = fusedopt.FusedAdamW([param], backend=backend_name(backend))
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


@each_backend
def test_an_expanded_gradient_is_read(backend: str) -> None:
    param = nn.Parameter(torch.randn(4, 300))
    param.grad = torch.randn(4, 1).expand(4, 300)
    clip = {"max_norm": 1.0}
    optimizer = fusedopt.FusedAdamW([param], clip_grad=clip, backend=backend_name(backend))
    check = CheckedStep(optimizer, min(1.0, 1.0 / (global_norm([param]) + 1e-6)))
    optimizer.step()
    check.check()


@each_backend
def test_an_expanded_parameter_is_refused(backend: str) -> None:
    base = torch.randn(4, 1)
    with pytest.raises(TypeError, match="share memory"):
        fusedopt.FusedSGD([nn.Parameter(base.expand(4, 300))], lr=1.0, backend=backend_name(backend))
    param, fine = nn.Parameter(torch.zeros(4, 300)), nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.FusedSGD([fine, param], lr=1.0, momentum=0.9, backend=backend_name(backend))
    param.data = base.expand(4, 300)
    param.grad, fine.grad = torch.ones(4, 300), torch.ones(3)
    before = bits([base, fine])
    with pytest.raises(TypeError, match=r"params'\]\[1\].*share memory"):
        optimizer.step()
    assert bits([base, fine]) == before
    assert not optimizer.state


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_share_memory_are_updated_one_after_the_other(threads: int) -> None:
    torch.set_num_threads(threads)
    base = torch.zeros(100_000)
    params = [nn.Parameter(base) for _ in range(20)]
    optimizer = fusedopt.FusedSGD(params, lr=1.0)
    for param in params:
        param.grad = torch.ones(100_000)
    for step in range(1, 4):
        optimizer.step()
        assert base.eq(-20.0 * step).all()


@each_backend
def test_write_back_into_a_strided_gradient(backend: str) -> None:
    param = nn.Parameter(torch.zeros(30))
    storage = torch.ones(60)
    param.grad = storage[::2]
    optimizer = fusedopt.FusedSGD([param], lr=1.0, write_back_grads=True, backend=backend_name(backend))
    optimizer.step(grad_scale=4.0)
    assert param.grad.tolist() == [0.25] * 30
    assert storage[1::2].tolist() == [1.0] * 30


@each_backend
def test_state_of_another_layout_than_its_parameter(backend: str) -> None:
    """torch keeps the layout it saved; loaded into a channels_last model, it differs from the parameter's."""
    param = nn.Parameter(torch.randn(4, 6, 5, 3))
    param.grad = torch.randn(4, 6, 5, 3)
    optimizer = fusedopt.FusedAdamW([param], backend=backend_name(backend))
    optimizer.step()
    param.data = param.data.contiguous(memory_format=torch.channels_last)
    param.grad = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """pytorch#101449, DeepSpeed#7640: a count that overflows an int, silently updating nothing."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if available < 14 * 2**20:
        pytest.skip(f"needs 14 GiB of free memory, {available / 2**20:.1f} GiB are free")
    count = 2**31 + 5
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    param.grad = torch.ones(count, dtype=torch.bfloat16)
    optimizer = fusedopt.FusedSGD([param], lr=1.0, clip_grad={"max_norm": float("inf")})
    optimizer.step()
    ends = param.detach()[[0, 1, 2**31 - 1, 2**31, count - 1]]
    assert ends.tolist() == [-1.0] * 5
    assert float(param.detach()[:: 2**20].float().sum()) == -float(len(param.detach()[:: 2**20]))
    assert float(optimizer.last_step.grad_norm) == pytest.approx(count**0.5, rel=1e-6)
