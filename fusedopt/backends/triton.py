"""The Triton backend: for GPUs that the compiled module has no kernels for, launched by the same plan."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..rules import PLAIN, Precision, Rule
from ..shards import Shards
from .base import BackendUnavailable
from .native import compiled_module
from .plan import PlanBackend
from .triton_scratch import ABSENT, DTYPES, rounds, scratch_parameter

__all__ = ["ABSENT", "DTYPES", "Launcher", "TritonBackend", "Tuning", "scratch_step"]

_LEAST_TRITON = (3, 6)
_PREPARE_ROWS = 128
#: What the update kernel calls the forms of columns, in the order in which the plan tells them.
_COLUMNS = ("PARAM", "GRAD", "A", "B", "C", "MASTER", "AVERAGE")


@functools.cache
def _triton_problem() -> str | None:
    """Why Triton cannot be used at all, or None."""
    try:
        import triton
    except ImportError as error:
        return (
            f"triton is not installed ({error}); torch's builds for GPUs bring one along, beside others there is "
            "pip install 'fusedopt[triton]'"
        )
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _LEAST_TRITON:
        return f"triton {triton.__version__} is installed; {'.'.join(map(str, _LEAST_TRITON))} or later is needed"
    return None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Tuning(NamedTuple):
    """How the update is launched: elements that a program works on at once, and its warps."""

    block: int
    warps: int


#: What is tried; the first serves where nothing may be measured. Chunks have 2048 elements or more.
_TUNINGS = tuple(Tuning(*pair) for pair in ((1024, 4), (512, 4), (1024, 8), (2048, 4), (2048, 8)))
#: Elements of the tensor it is tried on, or the next if there is no memory for it: more than caches hold, and enough
#: for chunks about as long as those of a large model.
_TUNING_ELEMENTS = (64 << 20, 16 << 20)
#: What was found out in this process, by name of the GPU, rule and dtypes.
_chosen: dict[tuple[str, str, tuple[int, ...]], Tuning] = {}
#: Kernels that were loaded in this process, by device and all that they are compiled for.
_loaded: set[tuple[Any, ...]] = set()


@functools.cache
def _has_slow_double(device: int) -> bool:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return not properties.gcnArchName.startswith("gfx9")
    module, _ = compiled_module()
    return module.has_slow_double(properties.major * 10 + properties.minor)


class Launcher:
    """Launches the kernels of one rule; its methods are called by the plan, see csrc/device/launch.h.

    Args:
        rule: whose kernels.
        device_type: ``'cuda'`` (of NVIDIA or AMD), ``'xpu'``, or ``'cpu'`` for the interpreter.
        tuning: of the update; None finds it out, once per device and dtypes, with the first step that needs it.
    """

    #: Whether tunings may be measured; else the first of them serves where the best is not known.
    may_measure = True

    def __init__(self, rule: Rule, device_type: str, tuning: Tuning | None = None):
        import triton

        from . import triton_kernels
        from .triton_kernels.rules import kernels_of

        self.rule = rule
        self.device_type = device_type
        self.tuning = tuning
        self.interpreted = interpreting()
        self._settings: dict[tuple[Any, ...], dict[str, Any]] = {}  # of updates that can be launched
        self._driver = triton.runtime.driver
        self._version = triton.__version__
        self._kernels = triton_kernels
        self._mine = kernels_of(rule.name)

    def stream(self, device: int) -> int:
        """The current stream of a device, as an address."""
        return 0 if self.interpreted else self._driver.active.get_current_stream(device)

    def capturing(self, device: int) -> bool:
        """Whether a graph of launches is being captured on the current stream."""
        probe = getattr(getattr(torch, self.device_type), "is_current_stream_capturing", None)
        return probe is not None and probe()

    def launch(self, kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
        """Launch ``programs`` programs of a kernel on the current stream; with 0, only load it.

        Raises:
            RuntimeError: it would have to be loaded in the capture of a graph.
        """
        if self.interpreted:
            import numpy

            with numpy.errstate(all="ignore"):  # infinities and NaN are the kernels' business
                kernel[(programs,)](*arguments, **settings)
            return
        device = self._driver.active.get_current_device()
        variant = (self.device_type, device, kernel, *settings.values())
        if variant not in _loaded and self.capturing(device):
            raise RuntimeError(
                f"the Triton kernel {kernel.__name__} for this kind of step has not been loaded, and cannot be while a "
                "graph is captured; make one such step before capturing"
            )
        # No contraction of products and sums: the same bits everywhere, and exact products of halves in power().
        if programs:
            kernel[(programs,)](*arguments, **settings, enable_fp_fusion=False)
        else:
            kernel.warmup(*arguments, **settings, enable_fp_fusion=False, grid=(1,))._init_handles()
        _loaded.add(variant)

    def map_chunks(self, tables: Any) -> None:
        """Fill in the chunk map."""
        self.launch(
            self._kernels.map_kernel, tables.row_count, tables.rows, tables.chunks, tables.chunk_elements, BLOCK=128
        )

    def statistics(self, device: int, a: Any) -> None:
        """The statistics pass, if there is something to find out, and the conclusions."""
        t = a.tables
        if (a.kind or a.check) and t.chunk_count:
            self.launch(
                self._kernels.statistics_kernel,
                t.chunk_count,
                *(t.grads, t.rows, t.layouts, t.chunks, t.partials, t.chunk_elements, a.p),
                KIND=a.kind,
                SLOW_DOUBLE=self.slow_double(device),
            )
        if a.totals:
            where = t.partials, t.chunk_count, t.rows, t.chunks, a.totals
            self.launch(self._kernels.total_kernel, a.domains, *where, KIND=a.kind, SEVERAL=a.domains > 1)
        else:
            self.conclude(a, t.partials, t.chunk_count)

    def conclude(self, a: Any, found: int, found_count: int) -> None:
        """Norm, clip coefficient and skip from the pairs that were found, then constants and step counts of rows."""
        t = a.tables
        numbers = [
            x for number in (a.scale, a.found_inf, a.max_norm) for x in (number.value, number.live, number.dtype)
        ]
        average = a.average
        self.launch(
            self._kernels.prepare_kernel,
            -(-t.row_count // _PREPARE_ROWS),
            *(t.grads, t.rows, t.groups, t.scalars, t.control, t.row_count),
            *(found, found_count, a.p, *numbers, a.report.scalars, a.report.found_inf),
            *(average.momentum, average.gamma, average.begin, average.interval),
            CONSTANTS=self._mine.constants,
            KIND=a.kind,
            CHECK=a.check,
            HAS_FOUND_INF=a.has_found_inf,
            REFUSE_NONFINITE=a.refuse_nonfinite,
            REPORT_DOUBLE=a.report.scalars_are_double,
            AVERAGE=average.momentum > 0,
            BLOCK=_PREPARE_ROWS,
        )

    def load(self, device: int, a: Any, dtypes: tuple[int, ...]) -> None:
        """Compile and tune what :meth:`update` is about to launch, as long as a failure leaves everything as it was."""
        variant = (device, dtypes, a.reverse, a.write_back)
        if variant in self._settings:
            return
        tuning = self.tuning_for(device, dtypes)
        settings = {
            "UPDATE": self._mine.update,
            **dict(zip(_COLUMNS, dtypes, strict=False)),
            "CHANCE": rounds(dtypes),
            "REVERSE": a.reverse,
            "WRITE_BACK": a.write_back,
            "BLOCK": tuning.block,
            "RAGGED": tuning.block if self.interpreted else 64 * tuning.warps,
            "num_warps": tuning.warps,
        }
        if not self.interpreted:
            self.launch(self._kernels.update_kernel, 0, *self._arguments(a), **settings)
        self._settings[variant] = settings

    def update(self, device: int, a: Any, dtypes: tuple[int, ...]) -> None:
        """The update pass over chunks of rows whose columns have these dtypes."""
        settings = self._settings[device, dtypes, a.reverse, a.write_back]
        self.launch(self._kernels.update_kernel, a.chunk_count, *self._arguments(a), **settings)

    def _arguments(self, a: Any) -> tuple[Any, ...]:
        t = a.tables
        addresses = (t.grads, t.rows, t.layouts, t.chunks, t.scalars, t.control)
        return *addresses, t.chunk_elements, a.first_chunk, a.clip_value, a.seed

    def slow_double(self, device: int) -> bool:
        """Whether float64 arithmetic is so slow that a norm is first added up, in short runs, in float32."""
        return self.device_type == "cuda" and _has_slow_double(device)

    def tuning_for(self, device: int, dtypes: tuple[int, ...]) -> Tuning:
        if self.tuning is not None:
            return self.tuning
        if self.interpreted:
            return Tuning(2048, 1)
        key = (getattr(torch, self.device_type).get_device_name(device), self.rule.name, dtypes)
        if key not in _chosen:
            tuning = self._kept_tuning(key)
            if tuning is None and self.may_measure and not self.capturing(device):
                tuning = self._measure(torch.device(self.device_type, device), dtypes)
                if tuning is not None:
                    self._keep_tuning(key, tuning)
            if tuning is None:
                return _TUNINGS[0]
            _chosen[key] = tuning
        return _chosen[key]

    def _measure(self, device: torch.device, dtypes: tuple[int, ...]) -> Tuning | None:
        """The fastest of the tunings for the update of a large tensor, or None when none could be tried."""
        from triton.runtime.errors import TritonError

        times: dict[Tuning, float] = {}
        try:
            for elements in _TUNING_ELEMENTS:
                for tuning in _TUNINGS:
                    # Out of memory, or out of what a program may use.
                    with contextlib.suppress(RuntimeError, TritonError):
                        times[tuning] = self._time(tuning, device, dtypes, elements)
                if times:
                    return min(times, key=times.__getitem__)
            return None
        finally:
            # It took a gigabyte or more, which torch's allocator would keep, in blocks that fit nobody else. This gives
            # back all that is free, so that the next iteration allocates anew; never in a capture, where none is timed.
            getattr(torch, self.device_type).empty_cache()

    def _time(self, tuning: Tuning, device: torch.device, dtypes: tuple[int, ...], elements: int) -> float:
        """Milliseconds that an update takes."""
        from triton.testing import do_bench

        launcher = _Recorder(self.rule, self.device_type, tuning)
        step = scratch_step(launcher, device, dtypes, elements)  # whose memory is at work below
        step()
        return do_bench(launcher.update_again, warmup=5, rep=20, return_mode="median")

    def _cache(self, key: tuple[Any, ...]) -> Any:
        """Triton's cache on disk, for these kernels and this key."""
        from triton.runtime.cache import get_cache_manager

        sources = (self._kernels.update_kernel.cache_key, self._mine.update.cache_key, self._version)
        return get_cache_manager(hashlib.sha256(f"{sources}{key}{_TUNINGS}".encode()).hexdigest())

    def _kept_tuning(self, key: tuple[Any, ...]) -> Tuning | None:
        """What an earlier process has found out, or None."""
        with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):  # no cache, or something else in it
            path = self._cache(key).get_file("fusedopt-tuning.json")
            if path is not None:
                with open(path, encoding="utf-8") as file:
                    return _TUNINGS[_TUNINGS.index(Tuning(*json.load(file)))]
        return None

    def _keep_tuning(self, key: tuple[Any, ...], tuning: Tuning) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # a cache that cannot be written costs time, no more
            self._cache(key).put(json.dumps(tuning), "fusedopt-tuning.json", binary=False)


class _Recorder(Launcher):
    """Remembers its last update, to launch it by itself."""

    _last: tuple[Any, ...]

    def update(self, device: int, a: Any, dtypes: tuple[int, ...]) -> None:
        super().update(device, a, dtypes)
        settings = self._settings[device, dtypes, a.reverse, a.write_back]
        self._last = a.chunk_count, self._arguments(a), settings

    def update_again(self) -> None:
        """Launch the last update once more."""
        programs, arguments, settings = self._last
        self.launch(self._kernels.update_kernel, programs, *arguments, **settings)


def scratch_step(
    launcher: Launcher, device: torch.device, dtypes: tuple[int, ...], elements: int
) -> Callable[..., None]:
    """A step of one parameter of its own with these forms of columns; ``clip=True`` makes it one with all passes."""
    groups, state, precision = scratch_parameter(launcher.rule, dtypes, elements, device)
    plan = _make_plan(launcher, precision=precision)

    def step(clip: bool = False) -> None:
        norm_type, max_norm = (2.0, 1.0) if clip else (0.0, 0.0)
        plan.step(groups, state, 1.0 if clip else None, None, clip, norm_type, max_norm, False, math.inf, False)

    return step


def _make_plan(launcher: Launcher, shards: Shards | None = None, **kept: Any) -> Any:
    module, reason = compiled_module()
    if module is None:
        raise BackendUnavailable(str(reason))
    return module.StepPlan(launcher.rule.name, launcher.device_type, launcher=launcher, shards=shards, **kept)


class TritonBackend(PlanBackend):
    """Triton kernels over the same plan, for GPUs of NVIDIA, AMD and Intel.

    A step waits for nothing (but under ``error_if_nonfinite``) and can be captured in a CUDA graph. What it first needs
    is compiled, and its launches are tuned, in the first step of each combination of dtypes: seconds, of which Triton's
    cache on disk saves later processes most.
    """

    name = "triton"

    def __init__(
        self, rule: Rule, devices: Iterable[torch.device] = (), precision: Precision = PLAIN, may_measure: bool = True
    ):
        self._may_measure = may_measure
        super().__init__(rule, devices, precision)

    @classmethod
    def for_trial(cls, rule: Rule, device: torch.device, precision: Precision = PLAIN) -> TritonBackend:
        return cls(rule, {device}, precision, may_measure=False)

    def _make_plan(self) -> Any:
        launcher = Launcher(self.rule, self._device_type)
        launcher.may_measure = self._may_measure
        return _make_plan(launcher, self.shards, **self._how_state_is_kept())

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        module, reason = compiled_module()
        if module is None:
            return f"its plan is missing: {reason}"
        if (reason := _triton_problem()) is not None:
            return reason
        if device.type == "cpu":
            if interpreting():
                return None
            return (
                "Triton has no kernels for CPUs (TRITON_INTERPRET=1, set before the start, runs its slow interpreter)"
            )
        if device.type not in ("cuda", "xpu"):
            return f"Triton has no kernels for {device.type} tensors"
        if interpreting():
            return f"TRITON_INTERPRET is set, and the interpreter does not reach {device.type} tensors"
        torch_module = getattr(torch, device.type)
        if not torch_module.is_available():
            return f"torch finds no usable {device.type} device"
        if device.type == "xpu" and not torch_module.get_device_properties(device).has_fp64:
            return "the device has no float64 arithmetic, which norms are added up in"
        return _driver_problem(device.type)

    @classmethod
    def unavailable_for(cls, rule: Rule) -> str | None:
        from .triton_kernels.rules import has_kernels

        return None if has_kernels(rule.name) else f"triton has no kernels for the rule {rule.name}"


@functools.cache
def _driver_problem(device_type: str) -> str | None:
    """Why Triton cannot compile for the GPUs that torch has, or None."""
    import triton

    try:
        found = triton.runtime.driver.active.get_current_target().backend
    except Exception as error:  # each driver has its own
        words = str(error).splitlines() or [repr(error)]
        return f"triton {triton.__version__} finds no driver: {words[0]}"
    if found not in {"cuda": ("cuda", "hip"), "xpu": ("xpu",)}[device_type]:
        return f"triton {triton.__version__} compiles for {found}, not for {device_type}"
    return None
