"""The contenders of the benchmarks, one by one, and those of other packages."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_cases import (
    HERE,
    PEERS,
    TINY,
    _one_thread,  # noqa: F401  a fixture
    _short_collections,  # noqa: F401  a fixture
    install,  # noqa: F401  a fixture
    make,
    tiny,
)

from benchmarks.in_backward import IN_BACKWARD
from benchmarks.kept import KEPT
from benchmarks.peers import Apex
from fusedopt.backends import NativeBackend
from fusedopt.bench import CONTENDERS, OPTIMIZERS, RECIPES, Case, run
from fusedopt.bench.contenders import OURS, RIVAL, initial_tensors


class TestContender:
    @pytest.mark.parametrize(
        ("name", "recipe"),
        [
            (name, recipe)
            for name in HERE
            for recipe in RECIPES
            if CONTENDERS[name].unavailable(tiny("each", recipe=recipe)) is None
        ],
    )
    def test_each_step_begins_with_the_gradients_of_a_micro_batch(self, name, recipe):
        case = tiny("each", recipe=recipe)
        gradients = {parameter: grad for parameter, _, grad in initial_tensors(case)}
        originals = {parameter: grad.clone() for parameter, grad in gradients.items()}
        contender = CONTENDERS[name](case, gradients)
        for _ in range(3):
            contender.prepare()
            for parameter, param in contender.params.items():
                assert param.grad is not None and torch.equal(param.grad, originals[parameter])
            contender()
        assert all(torch.equal(gradients[parameter], original) for parameter, original in originals.items())

    def test_accumulates_micro_batches(self):
        contender = make(OURS, tiny(recipe="amp-clip-accumulate"))
        contender.prepare()
        contender()
        for parameter, _, grad in initial_tensors(contender.case):
            torch.testing.assert_close(contender.params[parameter].grad, 4 * grad)

    @pytest.mark.parametrize("grouping", ["two", "each"])
    @pytest.mark.parametrize("name", [name for name in HERE if CONTENDERS[name].unavailable(tiny()) is None])
    def test_has_the_case_s_groups(self, name, grouping):
        contender = make(name, tiny(grouping))
        names = {id(param): parameter for parameter, param in contender.params.items()}
        groups = [
            ([names[id(param)] for param in group["params"]], group["weight_decay"])
            for group in contender.optimizer.param_groups
        ]
        if grouping == "two" or name == "torch-merged":
            assert groups == [(["a.weight", "b.weight"], 0.05), (["a.bias", "scale"], 0.0)]
        else:
            assert groups == [([parameter], 0.05 if len(shape) > 1 else 0.0) for parameter, shape in TINY.items()]

    @pytest.mark.parametrize(("whole", "name"), IN_BACKWARD.items())
    @pytest.mark.parametrize("dtype", ["fp32", "bf16-grads"])
    def test_an_optimizer_for_each_parameter_does_what_one_for_all_does(self, whole, name, dtype):
        case = tiny("two", recipe="bare", dtype=dtype)
        contenders = make(whole, case), make(name, case)
        for contender in contenders:
            contender.prepare()
            contender()
        assert [len(each.param_groups[0]["params"]) for each in contenders[1].optimizers] == [1] * len(TINY)
        assert {type(each) for each in contenders[1].optimizers} == {type(contenders[0].optimizer)}
        for parameter in TINY:
            torch.testing.assert_close(contenders[1].params[parameter], contenders[0].params[parameter])

    @pytest.mark.parametrize(
        ("name", "case", "reason"),
        [
            ("torch-merged", tiny("one"), "there is one group"),
            ("torch-graphed", tiny(), "CUDA graphs need a GPU"),
            ("torch-grad-scale", tiny(recipe="amp"), "without clipping it is torch-fused"),
            *(
                (name, tiny(recipe=recipe), "in a backward pass one gradient is known at a time")
                for name in IN_BACKWARD.values()
                for recipe in ("amp", "clip")
            ),
            (
                "torch-compiled",
                Case("many", custom=lambda: dict.fromkeys(map(str, range(501)), ())),
                "torch.compile takes many minutes for so many tensors",
            ),
            *(
                (name, tiny(dtype="fp16"), "torch's GradScaler does not unscale gradients of fp16 parameters")
                for name in HERE
                if name.startswith("torch-")
            ),
        ],
    )
    def test_unavailable(self, name, case, reason):
        assert CONTENDERS[name].unavailable(case) == reason
        result = run(case, [name], 2)
        assert (result.left_out, result.times) == ({name: reason}, {})

    def test_a_backend_that_is_not_here(self, monkeypatch):
        monkeypatch.setattr(NativeBackend, "unavailable", classmethod(lambda cls, device: f"not built for {device}"))
        assert CONTENDERS["fusedopt-native"].unavailable(tiny()) == "not built for cpu"
        assert CONTENDERS["fusedopt-reference"].unavailable(tiny()) is None

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("torch-for-loop", (False, False)),
            ("torch-foreach", (True, None)),
            (RIVAL, (None, True)),
            ("torch-merged", (None, True)),
            ("torch-grad-scale", (None, True)),
        ],
    )
    def test_flags_of_torch(self, name, flags):
        defaults = make(name, tiny()).optimizer.defaults
        assert (defaults["foreach"], defaults["fused"]) == flags

    @pytest.mark.parametrize("name", CONTENDERS)
    def test_describes_itself_in_a_line(self, name):
        assert CONTENDERS[name].description
        assert "\n" not in CONTENDERS[name].description


COMMON = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 0.1}
#: What each package's class is called with, beside the groups.
ARGUMENTS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("deepspeed", "adam", "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": False, "bias_correction": True}),
    ("deepspeed", "adamw", "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": True, "bias_correction": True}),
    (
        "optimi",
        "sgd",
        "optimi",
        "SGD",
        {"decouple_lr": False, "kahan_sum": False, "decouple_wd": False, "dampening": False},
    ),
    ("optimi", "adam", "optimi", "Adam", {"decouple_lr": False, "kahan_sum": False, "decouple_wd": False}),
    ("optimi", "adamw", "optimi", "AdamW", {"decouple_lr": False, "kahan_sum": False}),
    ("torchao", "adamw", "torchao.optim", "_AdamW", {"amsgrad": False}),
    ("torchao", "amsgrad", "torchao.optim", "_AdamW", {"amsgrad": True}),
    ("torchao-8bit", "adamw", "torchao.optim", "AdamW8bit", {}),
    ("bitsandbytes", "sgd", "bitsandbytes.optim", "SGD32bit", {"momentum": 0.9}),
    ("bitsandbytes", "adamw", "bitsandbytes.optim", "AdamW32bit", {}),
    ("bitsandbytes-8bit", "sgd", "bitsandbytes.optim", "SGD8bit", {"momentum": 0.9}),
    ("bitsandbytes-8bit", "adamw", "bitsandbytes.optim", "AdamW8bit", {}),
    (
        "flashoptim",
        "sgd",
        "flashoptim",
        "FlashSGD",
        {"quantize": False, "master_weight_bits": None, "fused": False, "momentum": 0.9},
    ),
    ("flashoptim", "adam", "flashoptim", "FlashAdam", {"quantize": False, "master_weight_bits": None, "fused": False}),
    (
        "flashoptim",
        "adamw",
        "flashoptim",
        "FlashAdamW",
        {"quantize": False, "master_weight_bits": None, "fused": False, "decouple_lr": False},
    ),
]


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, type], list[dict[str, Any]]]:
    """Installs a module with one optimizer, in truth torch's; returns the list of what it is called with."""

    def inject(path: str, name: str, stock: type) -> list[dict[str, Any]]:
        received: list[dict[str, Any]] = []
        known = inspect.signature(stock).parameters

        def __init__(self: Any, params: Any, **arguments: Any) -> None:  # noqa: N807
            print("Welcome!")
            received.append(arguments)
            stock.__init__(self, params, **{key: value for key, value in arguments.items() if key in known})

        for end in [*(i for i, letter in enumerate(path) if letter == "."), len(path)]:
            module = ModuleType(path[:end])
            module.__spec__ = ModuleSpec(path[:end], None)
            monkeypatch.setitem(sys.modules, path[:end], module)
        setattr(module, name, type(name, (stock,), {"__init__": __init__}))
        return received

    return inject


class TestPeers:
    def test_arguments_of_all_are_here(self):
        tested = {(name, optimizer) for name, optimizer, *_ in ARGUMENTS}
        assert tested == {
            (name, optimizer)
            for name in PEERS
            if name != "apex"
            for optimizer in CONTENDERS[name].classes  # type: ignore[attr-defined]
        }

    @pytest.mark.parametrize(
        ("name", "optimizer", "path", "cls", "own"), [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in ARGUMENTS]
    )
    def test_are_built_with_torch_s_settings(self, fake_package, monkeypatch, capsys, name, optimizer, path, cls, own):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        received = fake_package(path, cls, getattr(torch.optim, OPTIMIZERS[optimizer].name))
        result = run(tiny("two", optimizer), [OURS, name], 2)
        assert result.left_out == {}
        assert list(result.times) == [OURS, name]
        assert received == [({"lr": 0.01} if optimizer == "sgd" else COMMON) | own]
        assert capsys.readouterr() == ("", "Welcome!\n")

    @pytest.mark.parametrize(
        ("optimizer", "arguments"),
        [
            ("sgd", {"lr": 0.01, "momentum": 0.9}),
            ("adam", COMMON | {"adam_w_mode": False}),
            ("adamw", COMMON | {"adam_w_mode": True}),
        ],
    )
    def test_arguments_of_apex(self, optimizer, arguments):
        apex = Apex.__new__(Apex)  # building one takes CUDA
        apex.case = Case("400x64", optimizer=optimizer, device="cuda")
        assert apex.arguments() == arguments

    def test_flashoptim_is_fused_on_cuda(self):
        contender = CONTENDERS["flashoptim"].__new__(CONTENDERS["flashoptim"])
        contender.case = Case("400x64", device="cuda")
        assert contender.arguments()["fused"] is True  # type: ignore[attr-defined]

    def test_deepspeed_is_told_to_stay_on_the_cpu_unless_told_otherwise(self, fake_package, monkeypatch):
        fake_package("deepspeed.ops.adam", "DeepSpeedCPUAdam", torch.optim.AdamW)
        for before, after in ((None, "cpu"), ("cuda", "cuda")):
            monkeypatch.setenv("DS_ACCELERATOR", "any")  # to be restored
            if before is None:
                monkeypatch.delenv("DS_ACCELERATOR")
            else:
                monkeypatch.setenv("DS_ACCELERATOR", before)
            make("deepspeed", tiny())
            assert os.environ["DS_ACCELERATOR"] == after

    def test_one_that_does_not_compute_what_torch_does(self, fake_package):
        fake_package("optimi", "AdamW", torch.optim.SGD)
        result = run(tiny(), [OURS, "optimi"], 2)
        assert list(result.times) == [OURS]
        assert result.left_out["optimi"].startswith("wrong result: ")

    def test_a_package_without_its_class(self, fake_package):
        fake_package("optimi", "Other", torch.optim.SGD)
        reason = run(tiny(), [OURS, "optimi"], 2).left_out["optimi"]
        assert reason.startswith("fails: AttributeError: module 'optimi' has no attribute 'AdamW'")

    @pytest.mark.parametrize("name", [*PEERS, f"mmengine-{RIVAL}"])
    def test_not_installed(self, install, name):
        package = getattr(CONTENDERS[name], "module", "mmengine")
        install(package, False)
        case = tiny()
        assert CONTENDERS[name].unavailable(case) == f"the package {package} is not installed"
        assert run(case, [name], 2).left_out == {name: f"the package {package} is not installed"}

    @pytest.mark.parametrize(
        ("name", "case", "reason"),
        [
            ("deepspeed", Case("400x64", device="cuda"), "needs cpu"),
            ("apex", Case("400x64"), "needs cuda"),
            ("apex", Case("400x64", device="cuda", optimizer="amsgrad"), "apex has no amsgrad equal to torch's"),
            ("deepspeed", tiny(optimizer="sgd"), "deepspeed has no sgd equal to torch's"),
            ("optimi", tiny(optimizer="amsgrad"), "optimi has no amsgrad equal to torch's"),
            ("torchao", tiny(optimizer="adam"), "torchao has no adam equal to torch's"),
            ("torchao-8bit", tiny(optimizer="amsgrad"), "torchao has no amsgrad equal to torch's"),
            ("bitsandbytes", tiny(optimizer="adam"), "bitsandbytes has no adam equal to torch's"),
            ("flashoptim", tiny(optimizer="amsgrad"), "flashoptim has no amsgrad equal to torch's"),
            ("optimi", tiny(dtype="fp16"), "torch's GradScaler does not unscale gradients of fp16 parameters"),
            (
                f"mmengine-{RIVAL}",
                tiny(dtype="fp16"),
                "torch's GradScaler does not unscale gradients of fp16 parameters",
            ),
            (f"mmengine-{RIVAL}", tiny(dtype="bf16-grads"), "mmengine's wrappers do not cast gradients"),
            ("optimi", tiny(dtype="fp16", recipe="clip"), None),
            ("optimi", Case("400x64", device="cuda"), None),
            ("apex", Case("400x64", device="cuda"), None),
            (f"mmengine-{RIVAL}", tiny(dtype="bf16"), None),
        ],
    )
    def test_unavailable_although_installed(self, install, name, case, reason):
        for package in (getattr(CONTENDERS[name], "module", "mmengine"), "cv2"):
            install(package, True)
        assert CONTENDERS[name].unavailable(case) == reason

    def test_mmengine_without_opencv(self, install):
        install("mmengine", True)
        install("cv2", False)
        assert CONTENDERS[f"mmengine-{RIVAL}"].unavailable(tiny()) == "the package cv2 is not installed"

    def test_only_quantized_states_are_approximate(self):
        found = [name for name in CONTENDERS if CONTENDERS[name].approximate]
        kept = [f"{OURS}-{name}" for name in KEPT]
        assert sorted(found) == sorted([*kept, "torchao-8bit", "bitsandbytes-8bit"])
