"""ProfilerHook: records a part of a run with torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import profiler

from ....messages import check_whole_number, did_you_mean
from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["ProfilerHook"]

_TRACES = ("log_trace", "tb_trace")


@HOOKS.register_module()
class ProfilerHook(Hook):
    """Records the first iterations of a run with ``torch.profiler.profile``, as ``mmengine.hooks.ProfilerHook``.

    Args:
        by_epoch: whether the first epoch is recorded; otherwise ``profile_times`` iterations are.
        profile_times: number of iterations; with ``by_epoch``, 1.
        activity_with_cpu: record the CPU.
        activity_with_cuda: record GPUs.
        schedule: arguments of ``torch.profiler.schedule``.
        on_trace_ready: a function that gets the profiler; or ``dict(type='log_trace')``, which prints a table, with the
            arguments of ``key_averages().table``; or ``dict(type='tb_trace')``, which writes files for TensorBoard,
            with the arguments of ``torch.profiler.tensorboard_trace_handler`` (``dir_name`` is ``tf_tracing_logs`` by
            default, within ``work_dir``).
        record_shapes, profile_memory, with_stack, with_flops: as for ``torch.profiler.profile``.
        json_trace_path: file for the trace, which Chrome can show.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        *,
        by_epoch: bool = True,
        profile_times: int = 1,
        activity_with_cpu: bool = True,
        activity_with_cuda: bool = False,
        schedule: Mapping[str, Any] | None = None,
        on_trace_ready: Callable[..., Any] | Mapping[str, Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        json_trace_path: str | Path | None = None,
    ):
        self.by_epoch = by_epoch
        self.profile_times = check_whole_number("profile_times", profile_times, 1)
        if by_epoch and profile_times > 1:
            raise ValueError(f"Invalid profile_times: {profile_times}; expected 1 with by_epoch=True")
        if isinstance(on_trace_ready, Mapping):
            kind = on_trace_ready.get("type")
            if kind not in _TRACES:
                raise ValueError(f"Invalid on_trace_ready type: {kind!r}; {did_you_mean(str(kind), _TRACES)}")
        elif on_trace_ready is not None and not callable(on_trace_ready):
            raise TypeError(f"on_trace_ready must be a function, a dict with a type, or None, got {on_trace_ready!r}")
        self.on_trace_ready = on_trace_ready
        self.json_trace_path = json_trace_path
        kinds = profiler.ProfilerActivity
        chosen = ((activity_with_cpu, kinds.CPU), (activity_with_cuda, kinds.CUDA))
        self._settings: dict[str, Any] = {
            "activities": [kind for wanted, kind in chosen if wanted],
            "schedule": None if schedule is None else profiler.schedule(**schedule),
            "record_shapes": record_shapes,
            "profile_memory": profile_memory,
            "with_stack": with_stack,
            "with_flops": with_flops,
        }
        self._profiler: Any = None
        self._left = 0

    def before_train(self, runner: Runner) -> None:
        """Start to record."""
        self._left = self.profile_times
        self._profiler = profiler.profile(**self._settings, on_trace_ready=self._handler(runner))
        self._profiler.start()

    def _handler(self, runner: Runner) -> Callable[..., Any] | None:
        if not isinstance(self.on_trace_ready, Mapping):
            return self.on_trace_ready
        settings = dict(self.on_trace_ready)
        if settings.pop("type") == "log_trace":
            return lambda recorded: print(recorded.key_averages().table(**settings))
        folder = Path(runner.work_dir) / settings.pop("dir_name", "tf_tracing_logs")
        return profiler.tensorboard_trace_handler(str(folder), **settings)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Count the iteration, and stop when there were enough."""
        if self._profiler is None:
            return
        self._profiler.step()
        if not self.by_epoch:
            self._left -= 1
            if not self._left:
                self._stop()

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop at the end of the epoch; in a run by iterations, at its end."""
        self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            finished, self._profiler = self._profiler, None
            finished.stop()
            if self.json_trace_path is not None:
                finished.export_chrome_trace(str(self.json_trace_path))

    def close(self) -> None:
        """Stop after a failure; nothing is exported then."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
