"""CheckpointHook: writes checkpoints and keeps the newest and the best."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ....messages import as_float, check_flag, check_whole_number, did_you_mean
from ...files import UNFINISHED, utf8_name
from ...registry import HOOKS
from ..checkpoint import LAST_CHECKPOINT, is_folder, read_checkpoint, write_atomically
from ..distributed import is_main_process
from ..sharded_checkpoint import read_folder, remove_checkpoint, remove_left_over
from .hook import Hook, check_local_files
from .rules import GREATER_KEYS, LESS_KEYS, RULES, rule_of

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["CheckpointHook"]


def _as_list(name: str, value: str | Sequence[str] | None) -> list[str]:
    values = [value] if isinstance(value, str) else value or ()
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    return list(values)


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Writes checkpoints at an interval and at the end, with the file names of ``mmengine.hooks.CheckpointHook``.

    A checkpoint is on disk before older ones are removed and before ``last_checkpoint`` names it, so the newest one is
    complete at all times.

    Args:
        interval: number of epochs or iterations between checkpoints; -1 for none.
        by_epoch: whether the interval is in epochs.
        save_optimizer: include the optimizer's state, which resuming needs.
        save_param_scheduler: include the schedulers' states, which resuming needs.
        out_dir: parent of the output folder, which is named like ``work_dir``; by default ``work_dir`` itself is used.
        max_keep_ckpts: number of newest checkpoints to keep; -1 for all. The best ones do not count.
        save_last: also save at the end, whatever the interval.
        save_best: names of metrics; the weights with the best value of each are kept. ``'auto'`` is the first metric.
        rule: whether ``'greater'`` or ``'less'`` is better, for all of ``save_best`` or as a list with one for each. By
            default the name of the metric decides.
        greater_keys: names, or parts of names, of metrics for which greater is better.
        less_keys: names, or parts of names, of metrics for which less is better.
        filename_tmpl: template of file names, where ``{}`` is the epoch or iteration; ``'epoch_{}.pth'`` or
            ``'iter_{}.pth'`` by default.
        save_begin: number of the epoch or iteration from which the interval counts.
        published_keys: at the end, also write files with only these keys of the last and the best checkpoints, such as
            ``['meta', 'state_dict']``; the beginning of the content's SHA-256 is in their names.
        backend_args: None or ``dict(backend='local')``: files are on a local disk.
        sharded: write folders instead, in which each process puts its shards of a model that ``fully_shard`` or tensor
            parallelism has sharded; named ``'epoch_{}'`` or ``'iter_{}'`` by default.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or a rule cannot be inferred.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = -1,
        by_epoch: bool = True,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | Path | None = None,
        max_keep_ckpts: int = -1,
        save_last: bool = True,
        save_best: str | Sequence[str] | None = None,
        rule: str | Sequence[str] | None = None,
        greater_keys: str | Sequence[str] | None = None,
        less_keys: str | Sequence[str] | None = None,
        filename_tmpl: str | None = None,
        save_begin: int = 0,
        published_keys: str | Sequence[str] | None = None,
        backend_args: Mapping[str, Any] | None = None,
        sharded: bool = False,
    ):
        check_local_files(backend_args)
        self.published_keys = _as_list("published_keys", published_keys)
        self.interval = check_whole_number("interval", interval)
        self.max_keep_ckpts = check_whole_number("max_keep_ckpts", max_keep_ckpts)
        self.save_begin = check_whole_number("save_begin", save_begin, 0)
        for name, number in (("interval", interval), ("max_keep_ckpts", max_keep_ckpts)):
            if number == 0:
                raise ValueError(f"Invalid {name}: 0; expected a whole number above 0, or -1")
        self.by_epoch = by_epoch
        self.save_optimizer = save_optimizer
        self.save_param_scheduler = save_param_scheduler
        self.out_dir = out_dir
        self.save_last = save_last
        self.sharded = check_flag("sharded", sharded)
        ending = "" if self.sharded else ".pth"
        self.filename_tmpl = filename_tmpl or (f"epoch_{{}}{ending}" if by_epoch else f"iter_{{}}{ending}")
        if self.filename_tmpl.count("{}") != 1:
            raise ValueError(f"filename_tmpl must have {{}} once, got {filename_tmpl!r}")
        self.greater_keys = _as_list("greater_keys", greater_keys) or list(GREATER_KEYS)
        self.less_keys = _as_list("less_keys", less_keys) or list(LESS_KEYS)
        self.save_best = _as_list("save_best", save_best)
        if len(set(self.save_best)) < len(self.save_best) or ("auto" in self.save_best and len(self.save_best) > 1):
            raise ValueError(f"save_best must name each metric once, or be 'auto' alone, got {save_best!r}")
        rules = _as_list("rule", rule)
        for each in rules:
            if each not in RULES:
                raise ValueError(f"Invalid rule: {each!r}; {did_you_mean(each, RULES)}")
        if len(rules) not in (0, 1, len(self.save_best)):
            raise ValueError(f"rule has {len(rules)} entries for {len(self.save_best)} metrics of save_best")
        self._given_rules = rules
        self.rules = {} if self.save_best == ["auto"] else self._tell_rules(self.save_best)
        self._folder: Path | None = None  # None outside a run
        self._kept: list[int] = []
        self._newest: Path | None = None

    def _tell_rules(self, metrics: Sequence[str]) -> dict[str, str]:
        if self._given_rules:
            given = self._given_rules * len(metrics) if len(self._given_rules) == 1 else self._given_rules
            return dict(zip(metrics, given, strict=True))
        return {metric: rule_of("save_best", metric, self.greater_keys, self.less_keys) for metric in metrics}

    def before_train(self, runner: Runner) -> None:
        """Set the folder, and remove leftovers of killed processes."""
        work_dir = Path(runner.work_dir)
        self._folder = work_dir if self.out_dir is None else Path(self.out_dir) / work_dir.name
        if is_main_process():
            for left_over in self._folder.glob(f"*{UNFINISHED}"):
                remove_left_over(left_over)
        self._kept = list(runner.message_hub.get_info("keep_ckpt_ids", ()))
        self._remove_outdated(runner)

    def after_train(self, runner: Runner) -> None:
        """Publish checkpoints, and leave the folder: a later validation is not part of the run."""
        if self.published_keys and self._folder is not None and is_main_process():
            infos = ("best_ckpt", *(f"best_ckpt_{metric}" for metric in self.rules))
            paths = [self._folder / utf8_name(name) for info in infos if (name := runner.message_hub.get_info(info))]
            if self.save_last and self._newest is not None:
                paths.append(self._newest)
            for path in paths:
                self._publish(runner, path)
        self._folder = None

    def _publish(self, runner: Runner, path: Path) -> None:
        checkpoint = read_folder(path, keys=self.published_keys) if is_folder(path) else read_checkpoint(path)
        for key in self.published_keys:
            if key not in checkpoint:
                runner.warn_once(f"published_keys: the checkpoints have no {key!r}; {did_you_mean(key, checkpoint)}")
        content = io.BytesIO()
        torch.save({key: checkpoint[key] for key in self.published_keys if key in checkpoint}, content)
        digest = hashlib.sha256(content.getvalue()).hexdigest()[:8]
        published = path.with_name(f"{path.stem}-{digest}.pth")
        write_atomically(published, lambda file: file.write(content.getvalue()))
        runner.logger.info(f"Published {published}")

    def after_train_epoch(self, runner: Runner) -> None:
        """Save if the interval is in epochs and due."""
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval, self.save_begin)
            or (self.save_last and self.is_last_train_epoch(runner))
        ):
            self._save(runner, runner.epoch + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Save if the interval is in iterations and due."""
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval, self.save_begin)
            or (self.save_last and self.is_last_train_iter(runner))
        ):
            self._save(runner, runner.iter + 1)

    def _save(self, runner: Runner, step: int) -> None:
        assert self._folder is not None
        if self.max_keep_ckpts > 0:
            # The outdated one is still in the list: if the process is killed now, the resumed run removes it.
            self._kept = [*(kept for kept in self._kept if kept != step), step]
            runner.message_hub.update_info("keep_ckpt_ids", list(self._kept))
        filename = utf8_name(self.filename_tmpl.format(step))
        path = runner.save_checkpoint(
            self._folder, filename, self.save_optimizer, self.save_param_scheduler, sharded=self.sharded
        )
        runner.logger.info(f"Saved {path}")
        self._newest = path
        if is_main_process():
            # The whole path, as MMEngine expects it.
            content = os.fsencode(path.resolve())
            write_atomically(Path(runner.work_dir) / LAST_CHECKPOINT, lambda file: file.write(content))
        self._remove_outdated(runner)

    def _remove_outdated(self, runner: Runner) -> None:
        if self.max_keep_ckpts <= 0:
            return
        assert self._folder is not None
        while len(self._kept) > self.max_keep_ckpts:
            outdated = self._folder / utf8_name(self.filename_tmpl.format(self._kept.pop(0)))
            if is_main_process():
                remove_checkpoint(outdated)
        runner.message_hub.update_info("keep_ckpt_ids", list(self._kept))

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Save the weights if a metric is better than ever before."""
        if not self.save_best or self._folder is None:
            return
        if not metrics:
            runner.logger.warning("The validation gave no metrics, so save_best does nothing")
            return
        if not self.rules:
            self.rules = self._tell_rules([next(iter(metrics))])
        for metric, rule in self.rules.items():
            if metric not in metrics:
                raise KeyError(f"save_best={metric!r} is not among the metrics; {did_you_mean(metric, metrics)}")
            score = as_float(metrics[metric])
            if score is None:
                raise TypeError(f"save_best={metric!r} is a {type(metrics[metric]).__name__}, not a number")
            self._save_if_best(runner, metric, score, rule)

    def _save_if_best(self, runner: Runner, metric: str, score: float, rule: str) -> None:
        hub = runner.message_hub
        suffix = "" if len(self.rules) == 1 else f"_{metric}"
        best = hub.get_info(f"best_score{suffix}", -math.inf if rule == "greater" else math.inf)
        if not (score > best if rule == "greater" else score < best):
            return
        assert self._folder is not None
        before = hub.get_info(f"best_ckpt{suffix}")
        step = runner.epoch if self.by_epoch else runner.iter
        filename = f"best_{metric}_{self.filename_tmpl.format(step)}".replace("/", "_")
        hub.update_info(f"best_score{suffix}", score)
        hub.update_info(f"best_ckpt{suffix}", filename)
        # A checkpoint holds names as text, whatever the locale makes of them.
        path = runner.save_checkpoint(
            self._folder, utf8_name(filename), save_optimizer=False, save_param_scheduler=False, sharded=self.sharded
        )
        if is_main_process() and before not in (None, filename):
            remove_checkpoint(self._folder / utf8_name(before))
        runner.logger.info(f"Saved {path}, the best so far with {metric} {score:.4f}")
