"""The interpreter of PTX by itself: what instructions do, and what it refuses. docs/ptx.md explains it."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np
import pytest
from cases import HAS_EMULATOR, module

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

ptx: Any = getattr(module, "ptx", None)

HEAD = """\
.version 9.0
.target sm_90
.address_size 64
.shared .align 8 .b8 room[64];
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	.reg .pred %p<9>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<20>;
	ld.param.u64 %rd1, [kernel_param_0];
	cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd3, %r1, 8;
	add.s64 %rd4, %rd2, %rd3;
	mov.u32 %r2, %ctaid.x;
"""
#: Of the first line of a body.
FIRST = HEAD.count("\n") + 1
#: A thread's 8 bytes of global memory are at [%rd4], its number is in %r1 and its block's in %r2.
THREADS = 32


def run(body: str, memory: np.ndarray | None = None, **launch: Any) -> np.ndarray:
    """Run a kernel of these instructions; what it leaves in memory, 8 bytes for each thread."""
    memory = np.zeros(THREADS * launch.get("warps", 1), np.uint64) if memory is None else memory
    code = ptx.Module(HEAD + body + "\n\tret;\n}\n", "test.ptx")
    code.run("kernel", [struct.pack("<Q", memory.ctypes.data)], **launch)
    return memory


def value_of(instruction: str) -> int:
    """What an instruction leaves in %rd9."""
    return int(run(f"\t{instruction}\n\tst.global.b64 [%rd4], %rd9;")[0])


def float_bits(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def double_bits(value: float) -> str:
    return f"0d{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def as_double(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<Q", bits))[0])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %rd9, -1, 3;", 2),
        ("sub.s32 %rd9, 1, 3;", 2**32 - 2),
        ("add.s64 %rd9, -1, 0;", 2**64 - 1),
        ("mul.lo.s32 %rd9, -2, 3;", 2**32 - 6),
        ("mul.wide.u32 %rd9, 0xFFFFFFFF, 2;", 2 * (2**32 - 1)),
        ("mul.wide.s32 %rd9, -1, 2;", 2**64 - 2),
        ("mad.lo.s32 %rd9, 3, 4, 5;", 17),
        ("mad.wide.u32 %rd9, 0xFFFFFFFF, 0xFFFFFFFF, 1;", (2**32 - 1) ** 2 + 1),
        ("div.s32 %rd9, -7, 2;", 2**32 - 3),
        ("div.u32 %rd9, 0xFFFFFFFF, 2;", 2**31 - 1),
        ("rem.s32 %rd9, -7, 2;", 2**32 - 1),
        ("rem.u32 %rd9, 0xFFFFFFFF, 10;", 5),
        ("min.s32 %rd9, -1, 2;", 2**32 - 1),
        ("max.u32 %rd9, 0xFFFFFFFF, 2;", 2**32 - 1),
        ("neg.s32 %rd9, 5;", 2**32 - 5),
        ("abs.s32 %rd9, -5;", 5),
        ("not.b32 %rd9, 0xF0;", 0xFFFFFF0F),
        ("xor.b32 %rd9, 12, 10;", 6),
        ("shl.b32 %rd9, 1, 31;", 2**31),
        ("shl.b32 %rd9, 1, 32;", 0),
        ("shr.u32 %rd9, 0x80000000, 31;", 1),
        ("shr.s32 %rd9, 0x80000000, 40;", 2**32 - 1),
        ("shr.b64 %rd9, 256, 4;", 16),
        ("bfe.u32 %rd9, 0xABCD, 4, 8;", 0xBC),
        ("bfi.b32 %rd9, 0xFB, 0x1234, 4, 4;", 0x12B4),
        ("bfi.b64 %rd9, 0x5, 0x7, 32, 32;", 0x500000007),
        ("bfi.b32 %rd9, 0xF, 0, 30, 8;", 0xC0000000),
        ("prmt.b32 %rd9, 0x03020100, 0x07060504, 0x7531;", 0x07050301),
        ("prmt.b32 %rd9, 0x80, 0, 0x0008;", 0x808080FF),
        ("cvt.u32.u64 %rd9, 0x100000002;", 2),
        ("cvt.s64.s32 %rd9, 0xFFFFFFFF;", 2**64 - 1),
        ("cvt.u64.u32 %rd9, 0xFFFFFFFF;", 2**32 - 1),
        ("cvt.s32.s8 %rd9, 0x80;", 2**32 - 128),
        ("cvt.rzi.s64.f64 %rd9, 0dC004000000000000;", 2**64 - 2),  # -2.5
        ("mov.b64 %rd9, {1, 2};", 1 + (2 << 32)),
        ("mov.u32 %rd9, %tid.x;", 0),
        ("mov.u32 %rd9, %nctaid.x;", 1),
        ("mov.u32 %rd9, %ntid.x;", 32),
        ("abs.f16x2 %rd9, 0x8001FFFF;", 0x00017FFF),
    ],
)
def test_integers(instruction: str, expected: int) -> None:
    assert value_of(instruction) == expected


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("add.rn.f32", 1.0, 2.0**-25, 1.0),
        ("sub.rn.f32", 1.0, 0.5, 0.5),
        ("mul.rn.f32", 3.0, -2.0, -6.0),
        ("div.rn.f32", 1.0, 3.0, float(np.float32(1) / np.float32(3))),
        ("add.rn.f32", math.inf, -math.inf, math.nan),
        ("min.NaN.f32", 1.0, -2.0, -2.0),
        ("max.NaN.f32", 1.0, -2.0, 1.0),
        ("max.NaN.f32", 1.0, math.nan, math.nan),
        ("min.NaN.f32", -math.inf, 2.0, -math.inf),
        ("add.rn.f64", 1.0, 2.0**-52, 1.0 + 2.0**-52),
        ("mul.rn.f64", 0.1, 0.1, 0.1 * 0.1),
        ("div.rn.f64", 1.0, 0.0, math.inf),
    ],
)
def test_arithmetic_is_rounded_once_and_a_nan_has_the_payload_of_a_gpu(
    name: str, a: float, b: float, expected: float
) -> None:
    single = name.endswith("f32")
    bits = float_bits if single else double_bits
    found = value_of(f"{name} %rd9, {bits(a)}, {bits(b)};")
    if math.isnan(expected):
        assert found == 0x7FFFFFFF
    else:
        assert (as_float if single else as_double)(found) == expected


def test_fused_multiplication_and_addition_round_once() -> None:
    a = 1 + 2.0**-30
    exact = value_of(f"fma.rn.f64 %rd9, {double_bits(a)}, {double_bits(a)}, {double_bits(-(1 + 2.0**-29))};")
    assert as_double(exact) == 2.0**-60


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 65504.0, 1e-7, 6e-8, 1e9, math.inf])
def test_halves_are_those_of_numpy(value: float) -> None:
    with np.errstate(over="ignore"):
        expected = int(np.float32(value).astype(np.float16).view(np.uint16))
    assert value_of(f"cvt.rn.f16.f32 %rd9, {float_bits(value)};") == expected
    assert value_of(f"cvt.rn.f16x2.f32 %rd9, {float_bits(1.0)}, {float_bits(value)};") == expected | 0x3C00 << 16
    assert as_float(value_of(f"cvt.f32.f16 %rd9, {expected};")) == float(np.uint16(expected).view(np.float16))


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    for bits, expected in [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81), (0x7FC00001, 0x7FFF)]:
        assert value_of(f"cvt.rn.bf16.f32 %rd9, 0x{bits:X};") == expected


@pytest.mark.parametrize(("name", "exact"), [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: 1 / math.sqrt(x))])
def test_approximations_are_off_by_a_unit_here_and_there(name: str, exact: Any) -> None:
    """Code whose results depend on them, beyond the error that they are allowed, is to be noticed."""
    off = set()
    for i in range(40):
        x = float(np.float32(1 + i / 41))
        near = np.float32(exact(x))
        found = as_float(value_of(f"{name}.approx.ftz.f32 %rd9, {float_bits(x)};"))
        off.add(round(float((np.float64(found) - np.float64(near)) / np.spacing(near))))
    assert off == {-1, 0, 1}


@pytest.mark.parametrize(
    ("name", "a", "b", "expected"),
    [
        ("lt.s32", "-1", "0", True),
        ("lt.u32", "-1", "0", False),
        ("hi.u32", "5", "4", True),
        ("eq.f32", "0x7FC00000", "0x7FC00000", False),
        ("ne.f32", "0x7FC00000", "0x3F800000", False),
        ("neu.f32", "0x7FC00000", "0x3F800000", True),
        ("geu.f32", "0x7FC00000", "0x3F800000", True),
        ("nan.f32", "0x7FC00000", "0x3F800000", True),
        ("num.f64", "0", "0", True),
        ("eq.f32", "0x80000000", "0", True),
    ],
)
def test_comparisons(name: str, a: str, b: str, expected: bool) -> None:
    body = f"\tsetp.{name} %p1, {a}, {b};\n\tselp.b64 %rd9, 1, 0, %p1;"
    assert value_of(body) == expected


def test_guards_branches_and_loops() -> None:
    body = """
	setp.lt.u32 %p1, %r1, 16;
	mov.b64 %rd9, 0;
	@!%p1 bra $done;
$again:
	add.s64 %rd9, %rd9, 1;
	cvt.u32.u64 %r3, %rd9;
	setp.le.u32 %p2, %r3, %r1;
	@%p2 bra $again;
$done:
	st.global.b64 [%rd4], %rd9;"""
    assert run(body).tolist() == [*range(1, 17), *[0] * 16]


def test_a_call() -> None:
    function = """\
.version 9.0
.target sm_80
.address_size 64
.func (.param .b64 result) twice(.param .b64 twice_param_0)
;
.visible .entry kernel(.param .u64 kernel_param_0)
{
	.reg .b64 %rd<9>;
	ld.param.u64 %rd1, [kernel_param_0];
	{ // callseq 0, 0
	.param .b64 param0;
	st.param.b64 [param0+0], 21;
	.param .b64 retval0;
	call.uni (retval0),
	twice,
	(
	param0
	);
	ld.param.b64 %rd2, [retval0+0];
	}
	st.global.b64 [%rd1], %rd2;
	ret;
}
.func (.param .b64 result) twice(.param .b64 twice_param_0)
{
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [twice_param_0];
	add.s64 %rd2, %rd1, %rd1;
	st.param.b64 [result+0], %rd2;
	ret;
}
"""
    memory = np.zeros(1, np.uint64)
    code = ptx.Module(function, "test.ptx")
    assert (code.architecture, code.kernels) == (80, ["kernel"])
    code.run("kernel", [struct.pack("<Q", memory.ctypes.data)])
    assert memory[0] == 42


def test_a_warp_exchanges_values() -> None:
    down = run("\tshfl.sync.down.b32 %r3, %r1, 1, 31, -1;\n\tst.global.u32 [%rd4], %r3;")
    assert down.tolist() == [*range(1, 32), 31]
    across = run("\tshfl.sync.bfly.b32 %r3|%p1, %r1, 16, 31, -1;\n\tst.global.u32 [%rd4], %r3;")
    assert across.tolist() == [*range(16, 32), *range(16)]
    assert set(run("\tredux.sync.max.s32 %r3, %r1, -1;\n\tst.global.u32 [%rd4], %r3;").tolist()) == {31}
    assert set(run("\tredux.sync.or.b32 %r3, %r1, -1;\n\tst.global.u32 [%rd4], %r3;").tolist()) == {31}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_block_exchanges_values(order: int) -> None:
    body = """
	setp.eq.u32 %p1, %r1, 40;
	bar.red.or.pred %p2, 0, %p1;
	@%p1 st.shared.u32 [room+8], %r1;
	bar.sync 0;
	ld.shared.u32 %r3, [room+8];
	selp.b32 %r4, %r3, 0, %p2;
	st.global.u32 [%rd4], %r4;"""
    assert set(run(body, warps=2, order=order).tolist()) == {40}


def test_atomics() -> None:
    memory = np.zeros(THREADS, np.uint64)
    run("\tatom.global.add.u32 %r3, [%rd2], 2;\n\tatom.global.or.b32 %r4, [%rd2+8], %r1;", memory)
    assert memory[:2].tolist() == [64, 31]
    wrapping = np.zeros(THREADS, np.uint64)
    run("\tatom.acq_rel.gpu.global.inc.u32 %r3, [%rd2], 6;", wrapping)  # wraps after 7
    assert wrapping[0] == 32 % 7


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("frobnicate.b32 %r3, %r1;", "unknown instruction: 'frobnicate'"),
        ("add.sat.s32 %r3, %r1, 1;", "unknown instruction: '.sat' of 'add'"),
        ("add.f32 %r3, %r1, %r1;", "not rounded to the nearest"),
        ("add.rn.ftz.f32 %r3, %r1, %r1;", "'.ftz' of 'add'"),
        ("fma.rz.f32 %r3, %r1, %r1, %r1;", "'.rz' of 'fma'"),
        ("max.f32 %r3, %r1, %r1;", "hands no NaN on"),
        ("sqrt.approx.f32 %r3, %r1;", "'.approx' of 'sqrt'"),
        ("add.rn.f16 %r3, %r1, %r1;", "of this type"),
        ("cvt.rni.s32.f32 %r3, %r1;", "'.rni' of 'cvt'"),
        ("ld.global.nc.u32 %r3, [%rd4];", "'.nc' of 'ld'"),
        ("ld.global.v4.b64 {%rd5, %rd6, %rd7, %rd8}, [%rd4];", "more than 16 bytes"),
        ("mov.u32 %r3, %clock;", "unknown special register"),
        ("mov.u32 %r3, nowhere;", "'nowhere' is not known"),
        ("bar.sync 1;", "another barrier than 0"),
        ("shfl.down.b32 %r3, %r1, 1, 31;", "without a mask"),
        ("add.s32 %r3, %r1;", "another number of operands"),
        ("membar.cta;", "'.cta' of 'membar'"),
        ("bra $nowhere;", "there is no label"),
        (".local .b8 stack[8];", "unknown directive"),
    ],
)
def test_what_is_not_known_is_an_error_with_its_line(statement: str, reason: str) -> None:
    text = HEAD + f"\tadd.s32 %r3, %r1, 1;\n\t{statement}\n\tret;\n}}\n"
    with pytest.raises(ptx.PtxError, match=re.escape(reason)) as found:
        ptx.Module(text, "some.ptx")
    if "label" not in reason:  # which is missed at the end of the function
        assert str(found.value).startswith(f"some.ptx:{FIRST + 1}: {statement.rstrip(';')}")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.u32 %r3, [%rd4+2];", "not aligned to the 4 bytes"),
        ("mov.b64 %rd5, 0;\nld.global.u32 %r3, [%rd5];", "the address is null"),
        ("ld.shared.u32 %r3, [room];", "shared byte 0 was never written"),
        ("mov.b64 %rd5, -4;\nld.shared.u32 %r3, [%rd5];", "outside of the block's shared memory"),
        ("ld.shared.u32 %r3, [room+64];", "outside of the block's shared memory"),
        ("st.shared.u32 [room], %r1;", "shared byte 0 was written by another thread"),
        (
            "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [room], %r1;\nld.shared.u32 %r3, [room];",
            "shared byte 0 was written by another thread",
        ),
        ("div.u32 %r3, 1, %r1;", "division by zero"),
        ("redux.sync.or.b32 %r3, %r1, 0xFFFF;", "leaves out lanes"),
        ("setp.eq.u32 %p1, %r1, 0;\n@%p1 redux.sync.or.b32 %r3, %r1, -1;", "lanes of its warp that do not come"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_an_error(body: str, reason: str) -> None:
    with pytest.raises(ptx.PtxError, match=re.escape(reason)) as found:
        run(body)
    assert "test.ptx:" in str(found.value) and "block 0, thread" in str(found.value)


def test_lanes_of_a_warp_may_store_the_same_value() -> None:
    run("\tmov.b32 %r3, 7;\n\tst.shared.u32 [room], %r3;")
    with pytest.raises(ptx.PtxError, match="written by another thread"):
        run("\tmov.b32 %r3, 7;\n\tst.shared.u32 [room], %r3;", warps=2)


def test_two_barriers_do_not_meet() -> None:
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $other;\n\tbar.sync 0;\n\tbra $end;\n$other:\n\tbar.sync 0;\n$end:"
    with pytest.raises(ptx.PtxError, match="waits while others wait at the barrier in line"):
        run(body, warps=2)


PUBLISH = """
	setp.ne.u32 %p1, %r1, 0;
	@%p1 bra $done;
	setp.ne.u32 %p2, %r2, 0;
	@%p2 bra $second;
	{early}
	st.global.b64 [%rd2+16], 9;
	{release}
	bra $done;
$second:
	{acquire}
	{load} %rd9, [%rd2+16];
	st.global.b64 [%rd2+8], %rd9;
$done:"""


BOTH = "atom.acq_rel.gpu.global.add.u32 %r3, [%rd2], 1;"
RELAXED = "atom.global.add.u32 %r3, [%rd2], 1;"


@pytest.mark.parametrize(
    ("release", "acquire", "load", "reason"),
    [
        (BOTH, BOTH, "ld.global.cg.b64", None),
        (f"membar.gl; {RELAXED}", f"{RELAXED} membar.gl;", "ld.relaxed.gpu.global.b64", None),
        (BOTH, BOTH, "ld.global.b64", "may find it in the L1 cache"),
        (RELAXED, BOTH, "ld.global.cg.b64", "has not released it"),
        (BOTH, RELAXED, "ld.global.cg.b64", "has not acquired it"),
    ],
)
def test_what_another_block_has_written(release: str, acquire: str, load: str, reason: str | None) -> None:
    body = PUBLISH.format(early="", release=release, acquire=acquire, load=load)
    if reason is None:
        assert run(body, blocks=2)[1] == 9
    else:
        with pytest.raises(ptx.PtxError, match=reason):
            run(body, blocks=2)


@pytest.mark.parametrize(
    ("early", "release"), [(BOTH, ""), (f"membar.gl; {RELAXED}", ""), ("membar.gl;", RELAXED)], ids=str
)
def test_a_release_before_the_store_does_not_release_it(early: str, release: str) -> None:
    body = PUBLISH.format(early=early, release=release, acquire=BOTH, load="ld.global.cg.b64")
    with pytest.raises(ptx.PtxError, match="has not released it"):
        run(body, blocks=2)


def test_before_the_kernel_before_is_through() -> None:
    memory = np.zeros(THREADS, np.uint64)
    read = "\tld.global.b64 %rd9, [%rd4];\n"
    wait = "\tgriddepcontrol.wait;\n"
    store = "\tst.global.b64 [%rd4], %rd9;"
    run("\tmov.b64 %rd9, 5;\n" + store, memory)
    with pytest.raises(ptx.PtxError, match="a load, before the kernel before is through"):
        run(read + wait + store, memory, early=True)
    run("\tmov.b64 %rd9, 5;\n" + store, memory)
    with pytest.raises(ptx.PtxError, match="a store before the kernel before is through"):
        run("\tmov.b64 %rd9, 5;\n" + store + wait, memory, early=True)
    run("\tmov.b64 %rd9, 5;\n" + store, memory)
    run(wait + read + store, memory, early=True)
    assert set(memory.tolist()) == {5}


def test_arguments_have_the_sizes_that_the_device_expects() -> None:
    code = ptx.Module(HEAD + "\tret;\n}\n", "test.ptx")
    with pytest.raises(ptx.PtxError, match="has 8 bytes on the device, and 4 on the host"):
        code.run("kernel", [bytes(4)])
    with pytest.raises(ptx.PtxError, match="takes 1 arguments, not 2"):
        code.run("kernel", [bytes(8), bytes(8)])
    with pytest.raises(ptx.PtxError, match="there is no kernel named other"):
        code.run("other", [bytes(8)])


def test_requests_and_sectors_are_counted() -> None:
    ptx.reset_counts()
    run("\tld.global.b64 %rd9, [%rd4];\n\tmad.wide.u32 %rd5, %r1, 8, %rd4;\n\tst.global.u32 [%rd2], 1;")
    found = ptx.counts()["kernel"]
    assert (found["launches"], found["blocks"], found["early"]) == (1, 1, 0)
    requests, sectors, most = found["accesses"]["ld.global.8"]
    assert (requests, sectors) == (1, most)
    assert 8 <= sectors <= 9  # the array may begin within a sector
    assert found["accesses"]["st.global.4"][1] == 1
