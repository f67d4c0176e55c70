"""The CUDA kernels' other loop, for columns that lie in fewer bits: the same bits in every column as the CPU kernels'.

Plans are driven directly here, so that every form meets every size and layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ptx_code
import pytest
import torch
from cases import HAS_EMULATOR, INF, bits, bits_but_for_nan, module
from cuda_cases import _code  # noqa: F401  for every test here

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

emulator: Any = getattr(module, "emulator", None)

WHOLE = (torch.uint8, torch.int16)
FLOAT, DOUBLE, BRAIN, HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
PLAIN = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
ROOTS = ("exp_avg", "exp_avg_sq_root", "max_exp_avg_sq_root")
CODES = ("exp_avg_codes", "exp_avg_sq_codes", "max_exp_avg_sq_codes")
MIXED = ("exp_avg", "exp_avg_sq_codes", "max_exp_avg_sq_root")
AVERAGE = (0.1, 0.0, 0, 1)
#: Edges of vectors, blocks of codes, warps and chunks.
SIZES = (1, 7, 64, 100, 129, 1000, 5000, 40000)
SHAPES = [(), (0,), *((size,) for size in SIZES)]
SHORT_SHAPES = [(), (7,), (100,), (1000,), (2100,)]
#: Of parameters, gradients and states.
LAYOUTS = [("transposed", "flat", "flat"), ("flat", "off", "transposed"), ("off", "transposed", "off")]
#: Of a shard's elements: the first, and sizes and strides of the others. The first is in step with random counters.
NUMBERS = [(64, (1000,), (1,)), (4, (1000,), (1,)), (3, (1000,), (1,)), (2**33 + 1, (20, 50), (70, 1))]


@dataclass(frozen=True)
class Setting:
    """A way to keep an optimizer's numbers."""

    param: torch.dtype = FLOAT
    grad: torch.dtype | None = None
    keys: tuple[str, ...] = PLAIN
    state: torch.dtype = FLOAT
    master: str | None = None
    seed: int | None = None
    average: tuple[float, float, int, int] | None = None
    #: Of the elements of all parameters, see NUMBERS.
    numbers: Any = None


SETTINGS = {
    "bf16-moments": Setting(state=BRAIN),
    "bf16-moments-chance": Setting(state=BRAIN, seed=3),
    "bf16-moments-average": Setting(state=BRAIN, average=AVERAGE),
    "roots": Setting(keys=ROOTS, state=HALF),
    "roots-chance": Setting(keys=ROOTS, state=HALF, seed=2**40 + 1),
    "codes": Setting(keys=CODES),
    "codes-chance": Setting(keys=CODES, seed=5),
    "mixed-forms": Setting(BRAIN, FLOAT, MIXED, BRAIN, "split8", 9, AVERAGE),
    "bf16-chance": Setting(BRAIN, seed=2),
    "bf16-chance-average": Setting(BRAIN, seed=2, average=(0.5, 0.0, 1, 2)),
    "fp16-chance": Setting(HALF, seed=2, average=(0.1, 10.0, 0, 1)),
    "master-of-bf16": Setting(BRAIN, keys=CODES, master="master", average=AVERAGE),
    "master-of-fp16": Setting(HALF, HALF, ROOTS, HALF, "master", 1),
    "split": Setting(BRAIN, keys=PLAIN, state=BRAIN, master="split", average=AVERAGE),
    "split8": Setting(BRAIN, keys=CODES, master="split8"),
    "split8-chance": Setting(BRAIN, keys=CODES, master="split8", seed=4, average=AVERAGE),
    "double-codes": Setting(DOUBLE, keys=CODES, average=AVERAGE),
    "double-codes-chance": Setting(DOUBLE, keys=CODES, seed=7),
    "double-bf16": Setting(DOUBLE, keys=PLAIN, state=BRAIN, seed=7),
    "double-roots": Setting(DOUBLE, keys=ROOTS, state=HALF, average=AVERAGE),
    "double-roots-chance": Setting(DOUBLE, keys=ROOTS, state=HALF, seed=8),
    "double-gradients": Setting(FLOAT, DOUBLE, CODES, average=AVERAGE),
}
BY_CHANCE = [name for name, setting in SETTINGS.items() if setting.seed is not None]
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def coded_bytes(count: int) -> int:
    return (count + 15) // 16 * 16 + 2 * ((count + 63) // 64)


def laid_out(values: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides: as they come, transposed, or one element off an aligned address."""
    if how == "off":
        base = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape)
    elif how == "transposed" and values.dim() == 2:
        base = torch.empty(values.shape[::-1], dtype=values.dtype).T
    else:
        return values.clone()
    return base.copy_(values)


@dataclass
class Run:
    """Parameters with a plan of their own; ``layouts`` are those of parameters, gradients and states."""

    setting: Setting
    shapes: list[tuple[int, ...]]
    device: str
    layouts: tuple[str, str, str] = ("flat", "flat", "flat")
    rule: str = "adam"
    amsgrad: bool = False
    devices: int = 1
    params: list[torch.nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.setting
        generator = torch.Generator().manual_seed(0)
        self.state: dict[Any, dict[str, torch.Tensor]] = {}
        keys = s.keys if self.rule == "adam" else tuple(key.replace("exp_avg", "momentum_buffer") for key in s.keys[:1])
        used = keys if self.amsgrad else keys[:2]
        for shape in self.shapes:
            value = torch.randn(shape, generator=generator).to(s.param)
            param = torch.nn.Parameter(laid_out(value, self.layouts[0]))
            self.params.append(param)
            mine = {"step": torch.zeros(())}
            for key in used:
                if key.endswith("_codes"):
                    mine[key] = torch.zeros(coded_bytes(value.numel()), dtype=torch.uint8)
                else:
                    dtype = (
                        HALF if key.endswith("_root") else DOUBLE if s.param == DOUBLE and s.state == FLOAT else s.state
                    )
                    mine[key] = laid_out(torch.zeros(shape, dtype=dtype), self.layouts[2])
            if s.master == "master":
                mine["master"] = laid_out(value.float(), self.layouts[2])
            elif s.master:
                low = torch.zeros(shape, dtype=torch.int16 if s.master == "split" else torch.uint8)
                mine["master_low"] = laid_out(low, self.layouts[2])
            if s.average:
                wide = DOUBLE if s.param == DOUBLE else FLOAT
                mine["ema"] = laid_out(value.to(wide), self.layouts[2])
            self.state[param] = mine
        master = {None: None, "master": "master"}.get(s.master, "master_low")
        precision = (
            list(keys),
            master,
            (s.seed is not None, s.seed or 0),
            s.average,
            lambda _: [s.numbers for _ in self.params],
        )
        count = (self.devices,) if self.device == "emulated" else ()
        assert module is not None
        self.plan = module.StepPlan(self.rule, self.device, *count, precision=precision)
        settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01, "maximize": False}
        if self.rule == "adam":
            settings |= {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": self.amsgrad, "decoupled_weight_decay": True}
        else:
            settings |= {"momentum": 0.9, "dampening": 0.1, "nesterov": True}
        self.groups = [{"params": self.params, **settings}]

    def set_gradients(self, step: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator) * scale * 10.0 ** (step - 2)
            dtype = self.setting.grad or param.dtype
            if dtype != param.dtype:
                param.grad_dtype = None
            param.grad = laid_out(grad.to(dtype), self.layouts[1])

    def step(self, mode: str = "bare", scale: float = 1.0, write_back: bool = False) -> Any:
        divisor = None if mode == "bare" else scale
        norm = {"norm": (2.0, 1e9)}.get(mode, (0.0, 0.0))
        value = 0.5 if mode == "value" else INF
        result = self.plan.step(
            self.groups, self.state, divisor, None, mode in ("check", "norm"), *norm, False, value, write_back
        )
        assert isinstance(result, tuple), result
        return result

    def contents(self, but_for_nan: bool = False) -> list[bytes]:
        """The bits of every column; what kind of NaN there is may not matter."""
        of = bits_but_for_nan if but_for_nan else bits
        columns = [*self.params, *(value for state in self.state.values() for value in state.values())]
        return [one for column in columns for one in (bits if column.dtype in WHOLE else of)([column])]


def both(setting: Setting, shapes: list[tuple[int, ...]], **more: Any) -> tuple[Run, Run]:
    return Run(setting, shapes, "emulated", **more), Run(setting, shapes, "cpu", **{**more, "devices": 1})


def names_of(run: Run) -> list[str]:
    return ["param"] * len(run.params) + [key for state in run.state.values() for key in state]


def assert_same(one: Run, other: Run, but_for_nan: bool = False) -> None:
    both = zip(names_of(one), one.contents(but_for_nan), other.contents(but_for_nan), strict=True)
    assert {name for name, a, b in both if a != b} == set()


def step_both(
    runs: tuple[Run, Run], step: int, mode: str = "bare", scale: float = 1.0, write_back: bool = False
) -> None:
    """A step of each, after which all columns are the same."""
    results = []
    for run in runs:
        run.set_gradients(step, scale)
        results.append(run.step(mode, scale, write_back))
    assert_same(*runs)
    if mode in ("check", "norm"):
        assert bits([results[0][1]]) == bits([results[1][1]])
    if write_back:
        assert bits(param.grad for param in runs[0].params) == bits(param.grad for param in runs[1].params)


@pytest.mark.parametrize("rule", ["adam", "amsgrad", "sgd"])
@each_setting
def test_bare_steps(setting: Setting, rule: str) -> None:
    more: dict[str, Any] = {"rule": rule.replace("amsgrad", "adam"), "amsgrad": rule == "amsgrad"}
    runs = both(setting, SHAPES if rule == "adam" else SHAPES[:-2], **more)
    for step in range(2):
        before = runs[0].contents()
        step_both(runs, step)
        assert all(a != b for a, b in zip(before, runs[0].contents(), strict=True) if len(a) > 100)


@pytest.mark.parametrize("mode", ["check", "norm", "value"])
@each_setting
def test_other_steps(setting: Setting, mode: str) -> None:
    runs = both(setting, SHORT_SHAPES)
    for step in range(2):
        step_both(runs, step, mode, [4.0, 1.0][step], write_back=step == 1)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="-".join)
@each_setting
def test_any_layout(setting: Setting, layouts: tuple[str, str, str]) -> None:
    shapes: list[tuple[int, ...]] = [(3, 7), (64, 10), (50, 41)]
    runs = both(setting, shapes, layouts=layouts)
    for step in range(2):
        step_both(runs, step, write_back=step == 1)


@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda numbers: str(numbers[0]))
@pytest.mark.parametrize("name", BY_CHANCE)
def test_numbers_of_a_shard(name: str, numbers: Any) -> None:
    """Random bits are those of the elements' numbers in the whole parameter."""
    runs = both(replace(SETTINGS[name], numbers=numbers), [(20, 50)])
    for step in range(2):
        step_both(runs, step)
    others = Run(SETTINGS[name], [(20, 50)], "cpu")
    for step in range(2):
        others.set_gradients(step)
        others.step()
    assert others.contents() != runs[0].contents()


@each_setting
def test_a_skipped_step_changes_nothing(setting: Setting) -> None:
    runs = both(setting, SHORT_SHAPES)
    step_both(runs, 0, "check")
    for run in runs:
        before = run.contents()
        run.set_gradients(1)
        grad = run.params[-1].grad
        assert grad is not None
        grad.view(-1)[-1] = INF
        run.step("check")
        assert run.contents() == before
    step_both(runs, 2)


@pytest.mark.parametrize("mode", ["bare", "norm"])
@each_setting
def test_any_order_on_several_devices(setting: Setting, mode: str) -> None:
    """One of which has rows of plain numbers as well, and rows that are not stepped."""
    want = Run(setting, SHORT_SHAPES, "cpu")
    orders = [Run(setting, SHORT_SHAPES, "emulated", devices=devices) for devices in (1, 2)]
    for step in range(2):
        for run in (want, *orders):
            emulator.configure(order=run.devices)
            run.set_gradients(step)
            run.params[2].grad = None
            run.step(mode)
    for run in orders:
        assert_same(run, want)


@each_setting
def test_blocks_that_are_not_finite(setting: Setting) -> None:
    """A number that is not finite makes a block of codes NaN, and no other."""
    runs = both(setting, [(200,), (1000,)])
    for step in range(3):
        for run in runs:
            run.set_gradients(step)
            for place, value in ((70, INF), (199, -INF)) if step == 1 else ():
                grad = run.params[0].grad
                assert grad is not None
                grad[place] = value
            run.step()
        assert_same(*runs, but_for_nan=True)


@pytest.mark.parametrize("mode", ["bare", "check"])
@each_setting
def test_a_replayed_step_is_one_more(setting: Setting, mode: str) -> None:
    runs = both(setting, SHORT_SHAPES)
    step_both(runs, 0, mode)
    emulator.begin_capture()
    written = runs[0].step(mode)  # the graph writes it
    graph = emulator.end_capture()
    for _ in range(3):
        graph.replay()
        runs[1].step(mode)
        assert_same(*runs)
    assert len(written) == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ptx_code.WANTED)
@each_setting
def test_nvcc_s_code(setting: Setting, arch: str) -> None:
    if ptx_code.NVCC is None or arch not in ptx_code.known_architectures():
        pytest.skip(f"no nvcc here that knows sm_{arch}")
    emulator.use_ptx(ptx_code.nvcc_modules(arch))
    runs = both(setting, [(129,), (1000,), (7, 11)])
    for step in range(2):
        step_both(runs, step, ["bare", "norm"][step], [1.0, 4.0][step])


@pytest.mark.slow
@pytest.mark.parametrize("layouts", LAYOUTS[:2], ids="-".join)
@pytest.mark.parametrize("name", ["mixed-forms", "double-codes-chance", "master-of-fp16"])
def test_nvcc_s_code_in_any_layout(name: str, layouts: tuple[str, str, str]) -> None:
    if "90" not in ptx_code.known_architectures():
        pytest.skip("no nvcc here that knows sm_90")
    emulator.use_ptx(ptx_code.nvcc_modules("90"))
    runs = both(replace(SETTINGS[name], numbers=None), [(20, 13)], layouts=layouts, amsgrad=True)
    for step in range(2):
        step_both(runs, step)
