"""LoggerHook: logs a run on the terminal, in files and in TensorBoard."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....messages import MissingExtraError, check_whole_number, encodable, require
from ...registry import HOOKS
from ..distributed import is_main_process
from .hook import Hook, check_local_files

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["LoggerHook"]

_TIMES = ("data_time", "time")


@HOOKS.register_module()
class LoggerHook(Hook):
    """Logs losses, learning rates, gradient norms and times every ``interval`` iterations, and evaluation metrics.

    Losses, norms and times are means over the last iterations (``window_size`` of the runner's ``log_processor``);
    learning rates are the last ones. They are read from the device only when they are logged. A terminal shows a
    progress bar if rich is installed; otherwise each log is a line. The runner's visualizer saves the same numbers.

    Args:
        interval: number of iterations between logs, counted within the epoch.
        ignore_last: whether the end of an epoch that is not a multiple of ``interval`` is not logged.
        log_metric_by_epoch: whether metrics are saved by the number of epochs done; otherwise, of iterations.
        out_dir: folder to which the log and scalars are copied at the end, in a subfolder named like ``work_dir``.
        interval_exp_name: number of iterations between lines with the name of the experiment.
        backend_args: None or ``dict(backend='local')``: files are on a local disk.

    Raises:
        TypeError, ValueError: an interval is not an int above 0, or ``backend_args`` is something else.
    """

    priority = "BELOW_NORMAL"

    def __init__(
        self,
        interval: int = 10,
        ignore_last: bool = True,
        log_metric_by_epoch: bool = True,
        out_dir: str | Path | None = None,
        interval_exp_name: int = 1000,
        backend_args: Mapping[str, Any] | None = None,
    ):
        check_local_files(backend_args)
        self.interval_exp_name = check_whole_number("interval_exp_name", interval_exp_name, 1)
        self.interval = check_whole_number("interval", interval, 1)
        self.ignore_last = ignore_last
        self.log_metric_by_epoch = log_metric_by_epoch
        self.out_dir = out_dir
        self._bar: _ProgressBar | None = None

    def before_train(self, runner: Runner) -> None:
        """Show the progress bar."""
        self._show_bar()
        if self._bar is not None:
            self._bar.begin("train", runner.max_iters, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        """Show the progress of the validation."""
        self._before_evaluation("val", runner.val_dataloader)

    def before_test_epoch(self, runner: Runner) -> None:
        """Show the progress of the test."""
        self._before_evaluation("test", runner.test_dataloader)

    def _before_evaluation(self, mode: str, dataloader: Any) -> None:
        self._show_bar()
        if self._bar is not None:
            self._bar.begin(mode, len(dataloader), 0)

    def _show_bar(self) -> None:
        if self._bar is None and is_main_process() and sys.stdout.isatty():
            try:
                self._bar = _ProgressBar()
            except MissingExtraError:
                return

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Log if due."""
        if self._bar is not None:
            self._bar.advance("train", runner.iter + 1)
        if self.every_n_train_iters(runner, self.interval_exp_name):
            runner.logger.info(f"Exp name: {runner.experiment_name}", extra={"on_progress_bar": self._bar is not None})
        length = len(runner.train_dataloader)
        at_end = batch_idx + 1 == length and (not self.ignore_last or length <= self.interval)
        if not (self.every_n_inner_iters(batch_idx, self.interval) or at_end):
            return
        scalars = _read_scalars(runner, "train")
        if runner.device.type == "cuda":
            scalars["memory"] = torch.cuda.max_memory_allocated(runner.device) // 2**20
        self._log_iteration(runner, "train", batch_idx, scalars)
        runner.visualizer.add_scalars({**scalars, "epoch": runner.epoch + 1, "iter": runner.iter + 1}, runner.iter + 1)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | Sequence[Any] | None = None,
        mode: str = "train",
    ) -> None:
        if self._bar is not None:
            self._bar.advance(mode, batch_idx + 1)
        if self.every_n_inner_iters(batch_idx, self.interval):
            self._log_iteration(runner, mode, batch_idx, _read_scalars(runner, mode, _TIMES))

    def _log_iteration(self, runner: Runner, mode: str, batch_idx: int, scalars: Mapping[str, float]) -> None:
        eta = str(datetime.timedelta(seconds=int(runner.message_hub.get_info("eta", 0))))
        text = _formatted(scalars)
        if self._bar is not None:
            self._bar.tell(mode, f"eta: {eta}  {text}")
        place = _place(runner, mode, batch_idx + 1)
        runner.logger.info(f"{place}  eta: {eta}  {text}", extra={"on_progress_bar": self._bar is not None})

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Log the metrics."""
        self._log_metrics(runner, "val", runner.val_dataloader, metrics)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Log the metrics."""
        self._log_metrics(runner, "test", runner.test_dataloader, metrics)

    def _log_metrics(self, runner: Runner, mode: str, dataloader: Any, metrics: Mapping[str, Any] | None) -> None:
        if self._bar is not None:
            self._bar.end(mode)
        scalars = {
            **_read_scalars(runner, mode, list(metrics or {})),
            **_read_scalars(runner, mode, _TIMES),
        }
        runner.logger.info(f"{_place(runner, mode, len(dataloader))}  {_formatted(scalars)}")
        runner.visualizer.add_scalars(scalars, runner.epoch if self.log_metric_by_epoch else runner.iter)

    def after_run(self, runner: Runner) -> None:
        """Copy the log and the scalars to ``out_dir``."""
        if self.out_dir is None or not is_main_process():
            return
        work_dir = Path(runner.work_dir)
        target = Path(self.out_dir) / work_dir.name
        target.mkdir(parents=True, exist_ok=True)
        for path in (work_dir / f"{runner.timestamp}.log", work_dir / "vis_data" / "scalars.json"):
            if path.exists():
                shutil.copy(path, target)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _read_scalars(runner: Runner, mode: str, names: Sequence[str] | None = None) -> dict[str, float]:
    """The scalars to log for a ``mode``: the last learning rates and metrics, and means of the rest."""
    scalars = {}
    for key, buffer in runner.message_hub.log_scalars.items():
        prefix, _, name = key.partition("/")
        if prefix != mode or (names is not None and name not in names):
            continue
        is_last = name.rpartition(".")[2] in ("lr", "base_lr") or (mode != "train" and name not in _TIMES)
        if buffer.data:  # all values may have been left out
            scalars[name] = buffer.current() if is_last else buffer.mean()
    return scalars


def _formatted(scalars: Mapping[str, float]) -> str:
    def one(name: str, value: float) -> str:
        return f"{name}: {value:.4e}" if name.rpartition(".")[2] in ("lr", "base_lr") else f"{name}: {value:.4g}"

    return "  ".join(one(name, value) for name, value in scalars.items())


def _place(runner: Runner, mode: str, done: int) -> str:
    """The progress as text, such as ``Epoch(train) [2][ 10/100]``."""
    by_epoch = runner.log_by_epoch
    if by_epoch is None:
        by_epoch = runner.train_loop is None or runner.train_loop.by_epoch
    if mode == "train":
        total = len(runner.train_dataloader) if by_epoch else runner.max_iters
        done = done if by_epoch else runner.iter + 1
    else:
        total = len(runner.val_dataloader if mode == "val" else runner.test_dataloader)
    number = f"[{runner.epoch + (mode == 'train')}]" if by_epoch else ""
    return f"{'Epoch' if by_epoch else 'Iter'}({mode}) {number}[{done:>{len(str(total))}}/{total}]"


class _ProgressBar:
    """Progress bars in a terminal, one for each mode that is running.

    Raises:
        MissingExtraError: rich is not installed.
    """

    def __init__(self) -> None:
        progress, column = require("rich.progress", "engine"), require("rich.table", "engine").Column
        # On a narrow terminal the status wraps; the rest keeps its width.
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20, table_column=column(no_wrap=True, min_width=20)),
            progress.MofNCompleteColumn(table_column=column(no_wrap=True)),
            progress.TextColumn("{task.fields[status]}", markup=False, table_column=column(no_wrap=False)),
        )
        self._tasks: dict[str, Any] = {}
        self._progress.start()

    def begin(self, mode: str, total: int, done: int) -> None:
        self.end(mode)
        self._tasks[mode] = self._progress.add_task(mode, total=total, completed=done, status="")

    def advance(self, mode: str, done: int) -> None:
        if mode in self._tasks:
            self._progress.update(self._tasks[mode], completed=done)

    def tell(self, mode: str, status: str) -> None:
        if mode in self._tasks:
            self._progress.update(self._tasks[mode], status=encodable(status, sys.stdout))

    def end(self, mode: str) -> None:
        if mode in self._tasks:
            self._progress.remove_task(self._tasks.pop(mode))

    def close(self) -> None:
        self._progress.stop()
