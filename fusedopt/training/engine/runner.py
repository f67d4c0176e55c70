"""Runner: trains from a config to the last checkpoint.

Long because MMEngine's constructor has thirty arguments, each of which is documented, checked and built in order.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...messages import check_flag, plain, some, warn_caller
from ..config import Config, ConfigError
from ..files import utf8_name
from ..registry import MMENGINE_SCOPE, check_config, is_known_scope, scope_by_default
from ..wrappers import OptimWrapper
from . import distributed
from .builders import HasBuilders
from .data import end_workers
from .hooks.hook import Hook
from .log import build_logger
from .loops import TestLoop, TrainLoop, ValLoop
from .message_hub import MessageHub
from .parts import (
    ENVIRONMENT_KEYS,
    build_visualizer,
    check_together,
    is_described,
    scale_lr,
    section,
    set_environment,
)
from .preflight import warn_of_what_will_not_act
from .random_states import fix_cublas_workspace, seed_everything
from .settings import optimizer_settings, scheduler_settings
from .undoing import leaves_no_trace_on_error
from .visualizer import Visualizer

__all__ = ["Runner"]


class Runner(HasBuilders):
    """Trains a model as a config describes, with the names of ``mmengine.runner.Runner``.

    Everything is built at once, so that mistakes in a config show before anything runs. Arguments of MMEngine's Runner
    that are missing here are not supported; fusedopt's optimizers also work in MMEngine's own Runner.

    Args:
        model: the model, with ``train_step`` and ``val_step`` as in :class:`BaseModel`, or its config.
        work_dir: folder for logs and checkpoints; it is created if needed.
        train_dataloader: training data: a loader or its config, see :func:`build_dataloader`.
        val_dataloader: validation data.
        test_dataloader: test data.
        train_cfg: ``dict(by_epoch=True, max_epochs=…, val_begin=1, val_interval=1)``, or ``dict(by_epoch=False,
            max_iters=…, val_begin=1, val_interval=1000)``; instead of ``by_epoch``, ``type`` may name a loop.
        val_cfg: ``dict(fp16=False)``.
        test_cfg: as ``val_cfg``.
        auto_scale_lr: ``dict(base_batch_size=…, enable=True)`` multiplies the learning rates by the number of samples
            in an iteration, over all processes, divided by ``base_batch_size``.
        optim_wrapper: the optimizer wrapper or its config, see :func:`fusedopt.build_optim_wrapper`; ``optimizer`` in
            it may be an optimizer; or a dict of wrappers by name.
        param_scheduler: schedulers, their configs, or a dict of these for several optimizers.
        val_evaluator: metrics of a validation: one, its config, or a list.
        test_evaluator: metrics of a test.
        default_hooks: merged by key over ``runtime_info``, ``timer``, ``sampler_seed``, ``logger``,
            ``param_scheduler`` and ``checkpoint``; None removes one.
        custom_hooks: a list of hooks and configs; ``priority`` in a config overrides the hook's own.
        data_preprocessor: passed to the model's config under this name.
        load_from: checkpoint to start from.
        resume: resume from ``load_from``, or else from the newest checkpoint in ``work_dir``; without one, start from
            the beginning.
        launcher: ``'none'``, or ``'pytorch'`` under ``torchrun``.
        env_cfg: ``dist_cfg=dict(backend=…)``, ``cudnn_benchmark``, ``mp_cfg=dict(mp_start_method='fork')``, ``device``,
            by default a GPU if available; ``resource_limit``, the number of files that may be open, and
            ``mp_cfg.opencv_num_threads``.
        log_processor: ``window_size``, the number of iterations over which logged losses are averaged (10), and
            ``by_epoch``, whether the log counts epochs (by default, as training does).
        log_level: a name such as ``'INFO'``, or a number.
        visualizer: a visualizer or its config; by default scalars go to ``vis_data/scalars.json`` in ``work_dir``.
        default_scope: the package in whose registries names are looked up first, while the Runner is built and runs;
            these registries are children of fusedopt's. Without it, or as ``'mmengine'``, fusedopt's are used.
        randomness: ``seed`` (random by default), ``diff_rank_seed`` (add the process's rank to it) and
            ``deterministic`` (torch's deterministic algorithms).
        experiment_name: by default the name of the config file.
        model_wrapper_cfg: config of the model wrapper for several processes: ``type`` and its arguments, such as
            ``find_unused_parameters``; ``dict(type='fully_shard')`` shards the model, see :func:`fully_shard`.
        resume_overrides: if the config was edited after the resumed checkpoint was written, use the edited settings of
            optimizers and schedulers. By default the checkpoint's are used, and a warning lists the edits.
        find_unused_parameters: for the wrapper of the model, unless ``model_wrapper_cfg`` says otherwise.
        sync_bn: ``'torch'`` makes BatchNorm layers torch's ``SyncBatchNorm`` if there are several processes.
        compile: whether the model's ``train_step`` is compiled: True, or the arguments of ``torch.compile``.
        cfg: the whole config. A :class:`Config` from a file is saved beside the checkpoints and named in errors.

    Raises:
        KeyError: an unknown ``type``.
        TypeError, ValueError: something has the wrong type, or is out of range, unknown or missing.
        ConfigError: any of these, if ``cfg`` is a :class:`Config`.

    An error leaves all arguments, such as models and wrappers, and the random generators as they were.
    """

    @leaves_no_trace_on_error
    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        work_dir: str | Path,
        train_dataloader: DataLoader | Mapping[str, Any] | None = None,
        val_dataloader: DataLoader | Mapping[str, Any] | None = None,
        test_dataloader: DataLoader | Mapping[str, Any] | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        val_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        auto_scale_lr: Mapping[str, Any] | None = None,
        optim_wrapper: OptimWrapper | Mapping[str, Any] | None = None,
        param_scheduler: Any = None,
        val_evaluator: Any = None,
        test_evaluator: Any = None,
        default_hooks: Mapping[str, Hook | Mapping[str, Any] | None] | None = None,
        custom_hooks: Sequence[Hook | Mapping[str, Any]] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        load_from: str | Path | None = None,
        resume: bool = False,
        launcher: str = "none",
        env_cfg: Mapping[str, Any] | None = None,
        log_processor: Mapping[str, Any] | None = None,
        log_level: int | str = "INFO",
        visualizer: Visualizer | Mapping[str, Any] | None = None,
        default_scope: str | None = None,
        randomness: Mapping[str, Any] | None = None,
        experiment_name: str | None = None,
        model_wrapper_cfg: Mapping[str, Any] | None = None,
        resume_overrides: bool = False,
        find_unused_parameters: bool = False,
        sync_bn: str | None = None,
        compile: bool | Mapping[str, Any] = False,
        cfg: Mapping[str, Any] | None = None,
    ):
        trains = check_together(train_dataloader=train_dataloader, train_cfg=train_cfg, optim_wrapper=optim_wrapper)
        validates = check_together(val_dataloader=val_dataloader, val_cfg=val_cfg, val_evaluator=val_evaluator)
        tests = check_together(test_dataloader=test_dataloader, test_cfg=test_cfg, test_evaluator=test_evaluator)
        if param_scheduler is not None and not trains:
            raise ValueError("param_scheduler is given, but there is no optim_wrapper whose settings it could change")
        auto_scale_lr = section("auto_scale_lr", auto_scale_lr, ("enable", "base_batch_size"))
        if not isinstance(compile, bool | Mapping):
            raise TypeError(f"compile must be True, False or a dict of torch.compile's arguments, got {compile!r}")
        if isinstance(compile, Mapping):
            section("compile", compile, ("fullgraph", "dynamic", "backend", "mode", "options", "disable"))
        self._compile: bool | Mapping[str, Any] = compile

        self.cfg = {} if cfg is None else cfg
        if not isinstance(work_dir, str | Path) or not work_dir:
            raise TypeError(f"work_dir must be a path, got {work_dir!r}")
        if load_from is not None and not isinstance(load_from, str | Path):
            raise TypeError(f"load_from must be a path or None, got {load_from!r}")
        if experiment_name is not None and not isinstance(experiment_name, str):
            raise TypeError(f"experiment_name must be a string or None, got {experiment_name!r}")
        flags = {
            "resume": resume if resume is not None else False,
            "resume_overrides": resume_overrides,
            "find_unused_parameters": find_unused_parameters,
            "auto_scale_lr.enable": auto_scale_lr.get("enable", False),
        }
        for flag, value in flags.items():
            check_flag(flag, value)
        if not isinstance(default_scope, str | None):
            raise TypeError(f"default_scope must be a string or None, got {default_scope!r}")
        self.default_scope = default_scope or MMENGINE_SCOPE
        log_settings = section("log_processor", log_processor, ("type", "by_epoch", "window_size"))
        kind = log_settings.get("type", "LogProcessor")
        if getattr(kind, "__name__", kind) not in ("LogProcessor", "mmengine.LogProcessor"):
            raise ValueError(
                f"log_processor has the type {kind!r}; only LogProcessor, with its window_size and by_epoch"
            )
        self.message_hub = MessageHub(log_settings.get("window_size", 10))
        self.log_by_epoch: bool | None = log_settings.get("by_epoch")
        if self.log_by_epoch is not None:
            check_flag("log_processor.by_epoch", self.log_by_epoch)
        with self._naming("default_scope"):
            if default_scope is not None and not is_known_scope(default_scope):
                warn_caller(
                    f"default_scope={default_scope!r}: no registry has this scope; names are looked up in fusedopt's"
                )
        with self._naming("env_cfg"):
            environment = section("env_cfg", env_cfg, ENVIRONMENT_KEYS)
            dist_cfg = section("env_cfg.dist_cfg", environment.get("dist_cfg"))
        self._cuda_was_in_use = torch.cuda.is_initialized()
        with self._naming("launcher"):
            self.launcher = launcher
            distributed.launch(launcher, **dist_cfg)
        with self._naming("env_cfg"):
            self.device, self._start_method = set_environment(environment)
        with self._naming("randomness"):
            randomness = section("randomness", randomness, ("seed", "diff_rank_seed", "deterministic"))
            for flag in ("diff_rank_seed", "deterministic"):
                check_flag(f"randomness.{flag}", randomness.get(flag, False))
            self.set_randomness(**randomness)
        self.work_dir = str(Path(utf8_name(str(work_dir))).resolve())
        self.timestamp = distributed.broadcast(time.strftime("%Y%m%d_%H%M%S"))
        filename = cfg.filename if isinstance(cfg, Config) else None
        name = experiment_name or (Path(filename).stem if filename else "")
        self.experiment_name = "_".join(filter(None, (name, self.timestamp)))
        self.logger = build_logger(self.work_dir, self.timestamp, log_level)
        ignored = [key for key in self.cfg if key not in self.config_keys() | {"custom_imports"}]
        if ignored:
            self.logger.warning(f"These keys of the config have no effect on the Runner: {some(ignored, len(ignored))}")
        self._warned_of: set[str] = set()
        self._hooks: list[Hook] = []
        self._load_from = load_from
        self._resume = bool(resume)
        self.resume_overrides = resume_overrides
        # The settings of the config, and those in effect, which may differ in a resumed run; see Note [Settings of a
        # resumed run].
        self.settings: dict[str, Any] = {}
        self.settings_in_effect: Mapping[str, Any] = self.settings
        self._loaded = False
        with self._naming("visualizer"):
            self.visualizer = build_visualizer(visualizer, Path(self.work_dir) / "vis_data")
        self._given = {
            "train_dataloader": train_dataloader,
            "val_dataloader": val_dataloader,
            "test_dataloader": test_dataloader,
            "val_evaluator": val_evaluator,
            "test_evaluator": test_evaluator,
            "data_preprocessor": data_preprocessor,
            "find_unused_parameters": find_unused_parameters,
            "sync_bn": sync_bn,
        }
        self.model = self.wrap_model(model_wrapper_cfg, self.build_model(model))
        self.train_loop: TrainLoop | None = None
        self.val_loop: ValLoop | None = None
        self.test_loop: TestLoop | None = None
        self.optim_wrapper = None
        self.param_schedulers: Any = None
        if validates:
            self.val_loop = self.build_val_loop(val_cfg)
        if tests:
            self.test_loop = self.build_test_loop(test_cfg)
        if trains:
            self.train_loop = self.build_train_loop(train_cfg)
            self.optim_wrapper = self.build_optim_wrapper(optim_wrapper)
            with self._naming("optim_wrapper"):
                described = optim_wrapper if is_described(optim_wrapper) else self.optim_wrapper
                self.settings.update(optimizer_settings(described))
            if auto_scale_lr.get("enable"):
                loader = self.train_loop.dataloader
                size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
                size = None if size is None else size * self.world_size
                with self._naming("auto_scale_lr"):
                    ratio = scale_lr(auto_scale_lr, self.optim_wrapper, param_scheduler, size)
                self.settings["auto_scale_lr"] = ratio
                self.logger.info(f"auto_scale_lr: the learning rates are multiplied by {ratio:g}")
            self.param_schedulers = self.build_param_scheduler(param_scheduler)
            with self._naming("param_scheduler"):
                self.settings.update(scheduler_settings(param_scheduler, self.max_epochs, self.max_iters))
        with self._naming("default_hooks"):
            self.register_default_hooks(default_hooks)
        with self._naming("custom_hooks"):
            self.register_custom_hooks(custom_hooks or ())
        warn_of_what_will_not_act(self)
        with self._naming("work_dir"):
            Path(self.work_dir).mkdir(parents=True, exist_ok=True)

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Runner:
        """Build a runner from a config, whose keys are the arguments of the class.

        Other keys are ignored, with one warning in the log that lists them.

        Args:
            cfg: needs ``model`` and ``work_dir``. Not changed.

        Raises:
            KeyError: one of these is missing, or a ``type`` is unknown.
            TypeError, ValueError: as for the class.
        """
        check_config("cfg", cfg)
        known = cls.config_keys()
        for key in ("model", "work_dir"):
            if key not in cfg:
                raise KeyError(f"the config of a Runner needs the key {key!r}; it has {', '.join(map(repr, cfg))}")
        for key in (key for key in cfg if key not in known and isinstance(key, str)):
            close = difflib.get_close_matches(key, known, 1, cutoff=0.9)
            if close:
                warn_caller(f"the config has {key!r}, which the Runner does not use; did you mean {close[0]!r}?")
        return cls(**{key: cfg[key] for key in cfg if key in known}, cfg=cfg)

    @classmethod
    def config_keys(cls) -> set[str]:
        """The keys of a config that :meth:`from_cfg` uses."""
        return set(inspect.signature(cls).parameters) - {"cfg"}

    @property
    def iter(self) -> int:
        """Number of iterations done; during an iteration, its number, counted from 0."""
        return 0 if self.train_loop is None else self.train_loop.iter

    @property
    def epoch(self) -> int:
        """Number of epochs done; during an epoch, its number, counted from 0."""
        return 0 if self.train_loop is None else self.train_loop.epoch

    @property
    def max_iters(self) -> int:
        """Total number of iterations."""
        return 0 if self.train_loop is None else self.train_loop.max_iters

    @property
    def max_epochs(self) -> int:
        """Total number of epochs; 1 when training by iterations."""
        return 0 if self.train_loop is None else self.train_loop.max_epochs

    @property
    def val_interval(self) -> int:
        """Number of epochs or iterations between validations, at present."""
        loop = self.train_loop
        return 0 if loop is None else loop.interval_after(loop.epoch if loop.by_epoch else loop.iter)

    @property
    def val_begin(self) -> int:
        """Number of the first epoch or iteration after which a validation may follow."""
        return 0 if self.train_loop is None else self.train_loop.val_begin

    @property
    def train_dataloader(self) -> Any:
        """The loader of the training data, or None."""
        return None if self.train_loop is None else self.train_loop.dataloader

    @property
    def val_dataloader(self) -> Any:
        """The loader of the validation data, or None."""
        return getattr(self.val_loop, "dataloader", None)

    @property
    def test_dataloader(self) -> Any:
        """The loader of the test data, or None."""
        return getattr(self.test_loop, "dataloader", None)

    @property
    def distributed(self) -> bool:
        """Whether there is a launcher for several processes."""
        return self.launcher != "none"

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return distributed.rank()

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return distributed.world_size()

    def set_randomness(
        self, seed: int | None = None, diff_rank_seed: bool = False, deterministic: bool = False
    ) -> None:
        """Seed all random generators.

        Args:
            seed: from 0 to 2**32 - 1; random by default, and the same in all processes.
            diff_rank_seed: add the rank of the process.
            deterministic: whether torch uses only deterministic algorithms. For a GPU, this also sets
                ``CUBLAS_WORKSPACE_CONFIG`` if the environment does not.

        Raises:
            ValueError: ``seed`` is out of range, or it is too late to make cuBLAS deterministic.
        """
        self.seed_is_given = seed is not None
        if seed is None:
            seed = distributed.broadcast(random.SystemRandom().getrandbits(31))
        seed = plain(seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"Invalid randomness.seed: {seed!r}; expected an int from 0 to 2**32 - 1, or None")
        self.seed = seed
        if deterministic:
            if self.device.type == "cuda":
                fix_cublas_workspace(self._cuda_was_in_use)
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        seed_everything((seed + self.rank) % 2**32 if diff_rank_seed else seed)

    def warn_once(self, message: str) -> None:
        """Log a warning, unless it was logged before."""
        if message not in self._warned_of:
            self._warned_of.add(message)
            self.logger.warning(message)

    def train(self) -> nn.Module:
        """Train, and return the model.

        Raises:
            RuntimeError: the config does not train.
            CheckpointError: a checkpoint cannot be loaded, resumed or written.
        """
        if self.train_loop is None or self.optim_wrapper is None:
            raise RuntimeError("there is nothing to train with: train_dataloader, train_cfg and optim_wrapper are None")
        if self.val_loop is not None and not hasattr(self.bare_model, "val_step"):
            raise TypeError(f"{type(self.bare_model).__name__} has no val_step; derive it from BaseModel")
        with self.running():
            self.optim_wrapper.initialize_count_status(self.model, self.iter, self.max_iters)
            self.load_or_resume()
            self._dump_config()
            if self._compile is not False:
                options = {} if self._compile is True else self._compile
                self.model.train_step = torch.compile(self.model.train_step, **options)
                self._compile = False  # done
            self.train_loop.run()
        return self.model

    def val(self) -> dict[str, Any]:
        """Validate, and return the metrics.

        Raises:
            RuntimeError: the config does not validate.
            CheckpointError: the checkpoint cannot be loaded.
        """
        return self._evaluate(self.val_loop, "val")

    def test(self) -> dict[str, Any]:
        """Test, and return the metrics.

        Raises:
            RuntimeError: the config does not test.
            CheckpointError: the checkpoint cannot be loaded.
        """
        return self._evaluate(self.test_loop, "test")

    def _evaluate(self, loop: ValLoop | TestLoop | None, mode: str) -> dict[str, Any]:
        if loop is None:
            raise RuntimeError(f"there is no {mode}: {mode}_dataloader, {mode}_cfg and {mode}_evaluator are None")
        with self.running():
            self.load_or_resume()
            return loop.run()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Call the hooks' ``before_run`` and ``after_run`` around the block; close everything at the end."""
        with contextlib.ExitStack() as stack:  # closes everything, even if one close fails
            stack.enter_context(scope_by_default(self.default_scope))
            stack.enter_context(self.message_hub.as_current())
            stack.callback(self.visualizer.close)
            for hook in reversed(self._hooks):
                stack.callback(hook.close)
            for loader in filter(None, (self.train_dataloader, self.val_dataloader, self.test_dataloader)):
                stack.callback(end_workers, loader)
            self.call_hook("before_run")
            yield
            self.call_hook("after_run")

    def _dump_config(self) -> None:
        """Save the config beside the checkpoints, under the name of its file."""
        if not isinstance(self.cfg, Config) or self.cfg.filename is None or not distributed.is_main_process():
            return
        path = Path(self.work_dir) / Path(self.cfg.filename).name
        if path.resolve() == Path(self.cfg.filename).resolve():
            return
        try:
            self.cfg.dump(path)
        except (ConfigError, OSError) as error:
            self.logger.warning(f"The config is not saved beside the checkpoints: {error}")
