"""Visualizer: saves the scalars and images of a run."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...messages import require
from ..files import utf8_name
from ..registry import VISBACKENDS, VISUALIZERS
from .distributed import is_main_process

__all__ = ["BaseVisBackend", "LocalVisBackend", "TensorboardVisBackend", "Visualizer"]


class BaseVisBackend(abc.ABC):
    """Base of the backends, which save scalars and images.

    Args:
        save_dir: the folder.
    """

    def __init__(self, save_dir: str | Path):
        self.save_dir = Path(save_dir)

    @abc.abstractmethod
    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Save numbers by name."""

    @abc.abstractmethod
    def add_image(self, name: str, image: Any, step: int) -> None:
        """Save an image, a uint8 array of height x width x 3."""

    def close(self) -> None:  # noqa: B027
        """Write pending data and release resources; more may follow."""


@VISBACKENDS.register_module()
class LocalVisBackend(BaseVisBackend):
    """Scalars as lines of JSON in ``scalars.json``, images as PNG files in ``vis_image``.

    A resumed run appends to the scalars: of two lines with the same step and names, the later one is valid.
    A number that is not finite is written as ``null``.

    Args:
        save_dir: the folder.
    """

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Append a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = json.dumps({**finite, "step": step}, allow_nan=False)
        self.save_dir.mkdir(parents=True, exist_ok=True)
        with open(self.save_dir / "scalars.json", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Write ``<name>_<step>.png``; slashes in the name become underscores."""
        folder = self.save_dir / "vis_image"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / utf8_name(f"{name.replace('/', '_')}_{step}.png")
        require("matplotlib.image", "plot").imsave(path, image)


@VISBACKENDS.register_module()
class TensorboardVisBackend(BaseVisBackend):
    """Scalars and images for TensorBoard, through torch's writer.

    Args:
        save_dir: the folder.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, save_dir: str | Path):
        super().__init__(save_dir)
        require("tensorboard", "engine")
        self._open_writer: Any = None

    @property
    def _writer(self) -> Any:
        if self._open_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._open_writer = SummaryWriter(str(self.save_dir))
        return self._open_writer

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write each one as its own scalar."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, name: str, image: Any, step: int) -> None:
        """Write the image."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write pending data."""
        if self._open_writer is not None:
            self._open_writer.close()
            self._open_writer = None


@VISUALIZERS.register_module()
class Visualizer:
    """Saves scalars and images, and draws predictions, with the names of ``mmengine.visualization.Visualizer``.

    Only the main process saves.

    Args:
        vis_backends: backends or their configs; a :class:`LocalVisBackend` by default.
        save_dir: the folder for backends without one.
        name: accepted for MMEngine's sake, without effect.

    Attributes:
        dataset_meta: information about the data set, such as the names of its ``classes``, for drawing.
    """

    def __init__(
        self,
        vis_backends: Sequence[BaseVisBackend | Mapping[str, Any]] | None = None,
        save_dir: str | Path = "vis_data",
        name: str = "visualizer",
    ):
        if vis_backends is None:
            vis_backends = [{"type": "LocalVisBackend"}]
        self.name = name
        self.dataset_meta: Mapping[str, Any] | None = None
        self._backends: list[Any] = []
        if is_main_process():
            self._backends = [
                VISBACKENDS.build(backend, save_dir=save_dir) if isinstance(backend, Mapping) else backend
                for backend in vis_backends
            ]

    def add_scalar(self, name: str, value: float | Tensor, step: int = 0) -> None:
        """Save a number."""
        self.add_scalars({name: value}, step)

    def add_scalars(self, scalar_dict: Mapping[str, float | Tensor], step: int = 0) -> None:
        """Save numbers by name."""
        scalars = {name: value if isinstance(value, int) else float(value) for name, value in scalar_dict.items()}
        for backend in self._backends:
            backend.add_scalars(scalars, step)

    def add_image(self, name: str, image: Any, step: int = 0) -> None:
        """Save an image.

        Args:
            name: name of the image.
            image: an array or tensor of height x width, optionally with 1 or 3 channels, last or first; uint8, or
                floats, which are scaled so that the lowest is black and the highest white.
            step: number of the iteration.
        """
        pixels = _as_pixels(image).numpy()
        for backend in self._backends:
            backend.add_image(name, pixels, step)

    def add_datasample(
        self,
        name: str,
        image: Any,
        data_sample: Any = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: float = 0,
        step: int = 0,
    ) -> None:
        """Draw an image with its labels and predictions, and save it.

        Numbers and strings of ``data_sample`` are written above the image, with the class name for ``*_label`` if
        ``dataset_meta`` has it; class maps, integer tensors of the size of the image, are drawn beside it.

        Args:
            name: name of the image.
            image: see :meth:`add_image`.
            data_sample: a dict, or an object with attributes.
            draw_gt: whether to draw the entries that begin with ``gt_``.
            draw_pred: whether to draw the other entries.
            show: must be False: there is no window.
            wait_time: accepted for MMEngine's sake, without effect.
            step: number of the iteration.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ValueError: ``show=True``.
        """
        if show:
            raise ValueError("show=True needs a window, which the Visualizer does not open; it saves images")
        if not self._backends:
            return
        fields = _fields(data_sample)
        fields = {key: fields[key] for key in fields if (draw_gt if key.startswith("gt_") else draw_pred)}
        pixels = _as_pixels(image)
        drawn = {key: _class_map(value, pixels.shape[:2]) for key, value in fields.items()}
        maps = {key: classes for key, classes in drawn.items() if classes is not None}
        text = [f"{key}: {self._text(key, value)}" for key, value in fields.items() if _is_text(value)]
        figure = require("matplotlib.figure", "plot").Figure(figsize=(3 * (1 + len(maps)), 3.4), dpi=100)
        canvas = require("matplotlib.backends.backend_agg", "plot").FigureCanvasAgg(figure)
        axes = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
        axes[0].imshow(pixels.numpy())
        for axis, (key, classes) in zip(axes[1:], maps.items(), strict=True):
            axis.imshow(classes.numpy(), cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
            axis.set_title(key, fontsize=8)
        for axis in axes:
            axis.set_axis_off()
        figure.suptitle("\n".join(text), fontsize=8)
        canvas.draw()
        self.add_image(name, require("numpy", "plot").array(canvas.buffer_rgba())[..., :3], step)

    def _text(self, key: str, value: Any) -> str:
        number = value.item() if isinstance(value, Tensor) else value
        classes = (self.dataset_meta or {}).get("classes")
        if classes is not None and key.endswith("label") and isinstance(number, int) and 0 <= number < len(classes):
            return f"{number} ({classes[number]})"
        return f"{number:.4g}" if isinstance(number, float) else str(number)

    def close(self) -> None:
        """Write pending data; more may follow."""
        for backend in self._backends:
            backend.close()


def _fields(data_sample: Any) -> dict[str, Any]:
    """The fields of a data sample: a dict's entries, an object's public attributes, or the prediction alone."""
    if data_sample is None:
        return {}
    if isinstance(data_sample, Mapping):
        return dict(data_sample)
    if isinstance(data_sample, (Tensor, int, float, str)):
        return {"pred": data_sample}
    if hasattr(data_sample, "all_items"):  # MMEngine's BaseDataElement, whose attributes have underscores
        return dict(data_sample.all_items())
    return {key: value for key, value in vars(data_sample).items() if not key.startswith("_")}


def _is_text(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, Tensor) and value.numel() == 1)


def _class_map(value: Any, size: tuple[int, ...]) -> Tensor | None:
    """``value``, or its ``data``, as a class map of that size, or None."""
    value = value if isinstance(value, Tensor) else getattr(value, "data", None)
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return None
    value = value.squeeze(0) if value.dim() == 3 else value
    return value.cpu() % 20 if tuple(value.shape) == tuple(size) and value.numel() > 1 else None


def _as_pixels(image: Any) -> Tensor:
    """An image as a uint8 tensor of height x width x 3 in CPU memory."""
    pixels = torch.as_tensor(image).detach().cpu()
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(-1)
    if pixels.dim() == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.permute(1, 2, 0)
    if pixels.dim() != 3 or pixels.shape[-1] not in (1, 3):
        shape = tuple(torch.as_tensor(image).shape)
        raise ValueError(f"an image has height x width, optionally with 1 or 3 channels, got shape {shape}")
    if pixels.is_floating_point():
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low).div((high - low).clamp(min=1e-12)).mul(255).round()
    return pixels.to(torch.uint8).expand(-1, -1, 3)
