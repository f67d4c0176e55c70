"""VisualizationHook: saves predictions as images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....messages import check_whole_number
from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["SegVisualizationHook", "VisualizationHook"]


@HOOKS.register_module()
class VisualizationHook(Hook):
    """Draws the predictions for some batches of a validation or test with the runner's visualizer.

    The images are ``data_batch['inputs']``, or the first entry of a batch that is a list or tuple;
    :meth:`Visualizer.add_datasample` describes what is drawn.

    Args:
        enable: whether the hook does anything.
        interval: number of batches between those that are drawn.
        max_images: maximum number of images per batch.
        show: must be False: images are saved, there is no window.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(self, enable: bool = False, interval: int = 50, max_images: int = 8, show: bool = False):
        if show:
            raise ValueError("show=True needs a window, which the Visualizer does not open; it saves images")
        self.enable = enable
        self.interval = check_whole_number("interval", interval, 1)
        self.max_images = check_whole_number("max_images", max_images, 1)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | Sequence[Any] | None = None,
        mode: str = "train",
    ) -> None:
        if not self.enable or mode == "train" or not self.every_n_inner_iters(batch_idx, self.interval):
            return
        if runner.rank != 0:
            return
        loader = runner.val_dataloader if mode == "val" else runner.test_dataloader
        runner.visualizer.dataset_meta = getattr(loader.dataset, "metainfo", None)
        images = _images(data_batch)
        pairs = zip(images, outputs or (), strict=False)
        for index, (image, output) in zip(range(self.max_images), pairs, strict=False):
            path = output.get("img_path") if isinstance(output, Mapping) else getattr(output, "img_path", None)
            name = Path(path).name if path else f"{batch_idx}_{index}"
            runner.visualizer.add_datasample(f"{mode}_{name}", image, data_sample=output, step=runner.iter)


def _images(data_batch: Any) -> Any:
    if not isinstance(data_batch, Mapping):
        return data_batch[0]
    if "inputs" not in data_batch:
        raise KeyError(
            f"the images to draw must be in data_batch['inputs']; the batch has {', '.join(map(repr, data_batch))}"
        )
    return data_batch["inputs"]


@HOOKS.register_module(replaceable=True)
class SegVisualizationHook(VisualizationHook):
    """:class:`VisualizationHook` with MMSegmentation's name and arguments: it draws class maps.

    Args:
        draw: whether the hook does anything.
        interval: number of batches between those that are drawn.
        show: must be False: images are saved, there is no window.
        wait_time: accepted for MMSegmentation's sake, without effect.
        max_images: maximum number of images per batch.
    """

    def __init__(
        self, draw: bool = False, interval: int = 50, show: bool = False, wait_time: float = 0.0, max_images: int = 8
    ):
        super().__init__(enable=draw, interval=interval, max_images=max_images, show=show)
        self.draw = draw
        self.wait_time = wait_time
