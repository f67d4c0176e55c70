"""Data loaders from configs: samplers, collate functions, and a data order that a resumed run reproduces."""

from __future__ import annotations

import itertools
import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate, get_worker_info

from ...messages import check_whole_number, is_dtensor
from ..registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, check_config
from .distributed import broadcast, rank, world_size
from .random_states import seed_everything

__all__ = [
    "DefaultSampler",
    "InfiniteSampler",
    "build_dataloader",
    "end_workers",
    "iterate",
    "moved",
    "pseudo_collate",
    "reseed",
    "sampler_of",
    "set_epoch",
]


class _ShardedSampler(Sampler[int]):
    """Base of the samplers here: the share of this process, and where the next pass begins."""

    def __init__(self, dataset: Sized, shuffle: bool, seed: int | None):
        if not len(dataset):
            raise ValueError(f"the data set {type(dataset).__name__} is empty")
        self.rank = rank()
        self.world_size = world_size()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed: int = broadcast(random.SystemRandom().getrandbits(31)) if seed is None else seed
        self._skipped = 0

    def skip_samples(self, count: int) -> None:
        """Skip the first ``count`` samples of the next pass, without loading them."""
        self._skipped = count

    def _take_skipped(self) -> int:
        skipped, self._skipped = self._skipped, 0
        return skipped


@DATA_SAMPLERS.register_module()
class DefaultSampler(_ShardedSampler):
    """Every sample once, divided among the processes, as ``mmengine.dataset.DefaultSampler``.

    Args:
        dataset: the data set.
        shuffle: shuffle with ``seed`` and the epoch.
        seed: the same in all processes; random by default.
        round_up: repeat the first samples so that every process gets the same number.

    Raises:
        ValueError: the data set is empty.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, round_up: bool = True):
        super().__init__(dataset, shuffle, seed)
        self.epoch = 0
        self.round_up = round_up
        if round_up:
            self.num_samples = math.ceil(len(dataset) / self.world_size)
            self.total_size = self.num_samples * self.world_size
        else:
            self.num_samples = math.ceil((len(dataset) - self.rank) / self.world_size)
            self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(size, generator=generator).tolist()
        else:
            order = list(range(size))
        padded = itertools.islice(itertools.cycle(order), self.total_size)
        return itertools.islice(padded, self.rank + self._take_skipped() * self.world_size, None, self.world_size)

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch


@DATA_SAMPLERS.register_module()
class InfiniteSampler(_ShardedSampler):
    """An endless stream of samples, pass after pass, as ``mmengine.dataset.InfiniteSampler``.

    For training by iterations. Its length is the size of the data set.

    Args:
        dataset: the data set.
        shuffle: shuffle each pass with ``seed``.
        seed: the same in all processes; random by default.

    Raises:
        ValueError: the data set is empty.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None):
        super().__init__(dataset, shuffle, seed)
        self.size = len(dataset)

    def _endless(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist() if self.shuffle else range(self.size)

    def __iter__(self) -> Iterator[int]:
        first = self.rank + self._take_skipped() * self.world_size
        return itertools.islice(self._endless(), first, None, self.world_size)

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the stream never ends."""


@FUNCTIONS.register_module()
def pseudo_collate(samples: Sequence[Any]) -> Any:
    """A batch with the structure of one sample, with lists in place of its tensors and numbers; nothing is stacked.

    Args:
        samples: the samples of the batch, all of one structure.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: pseudo_collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(pseudo_collate(entries) for entries in zip(*samples, strict=True)))
    if isinstance(first, (list, tuple)):
        return [pseudo_collate(entries) for entries in zip(*samples, strict=True)]
    return list(samples)


FUNCTIONS.register_module(module=default_collate)


# Note [Random numbers in workers]
# A worker process seeds its generators for its first batch when it starts, and for its next batch after each batch. So
# the random numbers of a batch depend only on the batch's number, neither on its worker nor on the batches before it,
# and a run that resumes in the middle of an epoch need not load those again. Without workers, data are loaded with the
# generators of the main process, whose states are in the checkpoint.
class _SeededCollate:
    """A collate function that also seeds the worker it runs in; see Note [Random numbers in workers].

    Args:
        collate: the collate function.
        seed: the seed of the run.
        length: number of batches in a pass; None for a pass without end.
        worker_init: called with the number of the worker when it starts.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        seed: int,
        length: int | None,
        worker_init: Callable[[int], None] | None,
    ):
        self.collate = collate
        self.seed = seed
        self.rank = rank()
        self.length = length
        self.worker_init = worker_init
        self.begin(0, 0)

    def begin(self, epoch: int, batch: int) -> None:
        """Set the epoch and batch at which the next workers start."""
        self.epoch, self.batch = epoch, batch

    def start_worker(self, worker: int) -> None:
        """The ``worker_init_fn`` of the loader."""
        self._move_on(worker, worker)
        if self.worker_init is not None:
            self.worker_init(worker)

    def _move_on(self, batches: int, worker: int) -> None:
        """Seed the generators for a worker's next batch, in this pass or, if none is left, in the next."""
        self.batch += batches
        if self.length is not None and self.batch >= self.length:  # a persistent worker continues with the next pass
            self.epoch, self.batch = self.epoch + 1, worker
        place = f"{self.seed}, {self.rank}, {self.epoch}, {self.batch}"
        seed_everything(random.Random(place).getrandbits(32))

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        worker = get_worker_info()
        if worker is not None:
            self._move_on(worker.num_workers, worker.id)
        return batch


class _First(Dataset[Any]):
    """The first ``size`` samples of a data set, with its attributes."""

    def __init__(self, dataset: Any, size: int):
        self._dataset, self._size = dataset, size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by unpickling, before there is a data set
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return self._size


def _first_batches(dataset: Any, count: int, settings: Mapping[str, Any]) -> Any:
    """The part of a data set that makes ``count`` batches in each process, for ``num_batch_per_epoch``."""
    check_whole_number("num_batch_per_epoch", count, 1)
    batch_sampler = settings.get("batch_sampler")
    own = batch_sampler.get("batch_size") if isinstance(batch_sampler, Mapping) else None
    size = count * settings.get("batch_size", own or 1) * world_size()
    if size > len(dataset):
        raise ValueError(f"num_batch_per_epoch={count} needs {size} samples; the data set has {len(dataset)}")
    return _First(dataset, size)


def _function(name: str, cfg: Any) -> Callable[..., Any]:
    """A function, given itself or as a config: ``type``, and its keyword arguments."""
    if callable(cfg):
        return cfg
    check_config(name, cfg)
    settings = dict(cfg)
    if "type" not in settings:
        raise KeyError(f"{name} needs the key 'type', got {settings!r}")
    with FUNCTIONS.switch_scope_and_registry(settings.pop("_scope_", None)) as registry:
        function = registry.resolve(settings.pop("type"))
    return partial(function, **settings) if settings else function


def build_dataloader(
    cfg: DataLoader | Mapping[str, Any], seed: int, shuffle: bool, start_method: str | None = None
) -> DataLoader:
    """Build a data loader from its config.

    Args:
        cfg: ``dataset`` (a config or an object), ``sampler`` (by default a :class:`DefaultSampler`), ``batch_sampler``,
            ``collate_fn`` (``'pseudo_collate'`` by default, as in MMEngine; torch's is ``'default_collate'``),
            ``worker_init_fn``, ``num_batch_per_epoch`` (use only the first samples, enough for so many batches in each
            process), and the arguments of ``torch.utils.data.DataLoader``. A finished loader is returned as
            it is. Not changed.
        seed: seed of the sampler and the workers.
        shuffle: whether the default sampler shuffles.
        start_method: how worker processes start: ``'fork'``, ``'spawn'`` or ``'forkserver'``; torch's choice by
            default.

    Raises:
        KeyError: no ``dataset``, or an unknown ``type``.
        TypeError: ``cfg`` or a part of it has the wrong type.
        ValueError: an empty data set, or arguments that exclude each other.
    """
    if isinstance(cfg, DataLoader):
        return cfg
    check_config("dataloader", cfg)
    settings = dict(cfg)
    if "dataset" not in settings:
        raise KeyError(f"dataloader needs the key 'dataset'; it has {', '.join(map(repr, settings)) or 'no keys'}")
    dataset = settings.pop("dataset")
    if isinstance(dataset, Mapping):
        dataset = DATASETS.build(dataset)
    batches = settings.pop("num_batch_per_epoch", None)
    if batches is not None:
        dataset = _first_batches(dataset, batches, settings)
    sampler = settings.pop("sampler", None)
    if sampler is None:
        sampler = {"type": "DefaultSampler", "shuffle": shuffle}
    if isinstance(sampler, Mapping):
        sampler = DATA_SAMPLERS.build(sampler, dataset=dataset, seed=seed)
    batch_sampler = settings.pop("batch_sampler", None)
    if isinstance(batch_sampler, Mapping):
        batch_sampler = DATA_SAMPLERS.build(batch_sampler, sampler=sampler, batch_size=settings.pop("batch_size", 1))
    worker_init = settings.pop("worker_init_fn", None)
    collate = _SeededCollate(
        _function("collate_fn", settings.pop("collate_fn", pseudo_collate)),
        seed,
        None,
        None if worker_init is None else _function("worker_init_fn", worker_init),
    )
    if start_method is not None and settings.get("num_workers"):
        settings.setdefault("multiprocessing_context", start_method)
    try:
        loader = DataLoader(
            dataset,
            sampler=sampler if batch_sampler is None else None,
            batch_sampler=batch_sampler,
            collate_fn=collate,
            worker_init_fn=collate.start_worker,
            **settings,
        )
    except TypeError as error:
        raise TypeError(f"dataloader: {error}") from error
    if not isinstance(sampler_of(loader), InfiniteSampler):
        collate.length = len(loader)
    return loader


def sampler_of(loader: DataLoader) -> Any:
    """The sampler of a loader: its batch sampler's, if that has one, or its own."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Set the number of the next pass in the sampler of ``loader``, if it has ``set_epoch``."""
    tell = getattr(sampler_of(loader), "set_epoch", None)
    if tell is not None:
        tell(epoch)


def iterate(loader: DataLoader, epoch: int, first: int) -> Iterator[Any]:
    """The batches of a pass over ``loader`` from number ``first`` on.

    Earlier batches are not loaded if the sampler has ``skip_samples`` and the workers' random numbers do not depend on
    them; otherwise they are loaded and discarded.

    Args:
        loader: the data loader.
        epoch: number of the pass.
        first: number of the first batch to return, from 0.
    """
    skip_samples = getattr(sampler_of(loader), "skip_samples", None)
    independent = isinstance(loader.collate_fn, _SeededCollate) or not loader.num_workers
    in_order = type(loader.batch_sampler) in (BatchSampler, type(None))
    if first and skip_samples is not None and independent and in_order:
        skip_samples(first * getattr(loader.batch_sampler, "batch_size", 1))
        loaded = first
    else:
        loaded = 0
    if isinstance(loader.collate_fn, _SeededCollate):
        loader.collate_fn.begin(epoch, loaded)
    batches = iter(loader)
    _passes[loader] = weakref.ref(batches)
    next(itertools.islice(batches, first - loaded, first - loaded), None)
    return batches


#: The latest pass over each loader, while there is one.
_passes: weakref.WeakKeyDictionary[DataLoader, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def end_workers(loader: DataLoader) -> None:
    """End the worker processes of ``loader``, persistent ones and those of an unfinished pass; the next has new ones.

    The garbage collector, which comes late where a run was left by an exception, cannot do it: it closes the queues
    first, so that no worker hears of its end, and then waits 5 seconds for each.
    """
    latest = _passes.pop(loader, None)
    shutdown = getattr(None if latest is None else latest(), "_shutdown_workers", None)  # of torch's iterators
    if shutdown is not None:
        shutdown()
        loader._iterator = None


def moved(data: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """``data`` with all tensors in its dicts, lists and tuples moved to ``device``; DTensors stay with their mesh."""
    if isinstance(data, Tensor):
        return data if is_dtensor(data) else data.to(device, non_blocking=non_blocking)
    if isinstance(data, Mapping):
        return {key: moved(value, device, non_blocking) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(moved(value, device, non_blocking) for value in data))
    if isinstance(data, (list, tuple)):
        return (list if isinstance(data, list) else tuple)(moved(value, device, non_blocking) for value in data)
    return data


def reseed(loader: DataLoader, old: int, new: int) -> None:
    """Give a loader of :func:`build_dataloader` the seed ``new`` in place of ``old``."""
    if isinstance(loader.collate_fn, _SeededCollate):
        for part in (sampler_of(loader), loader.collate_fn):
            if getattr(part, "seed", None) == old:
                part.seed = new
