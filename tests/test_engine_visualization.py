"""Predictions as images: which are drawn, what is on them, where they go."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import PointNet, Points, config, loader, train

from fusedopt.messages import MissingExtraError
from fusedopt.training.engine import LocalVisBackend, SegVisualizationHook, VisualizationHook, Visualizer

matplotlib_image = pytest.importorskip(
    "matplotlib.image", reason="matplotlib is not installed: pip install 'fusedopt[plot]'"
)


class Pictures(Points):
    """Points, each with an image that nothing is learnt from."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.zeros(3, 6, 9)
        image[:, :, index % 9] = 1
        return {**super().__getitem__(index), "inputs": image}


class PictureNet(PointNet):
    """Sees the first four values of an image; predicts classes, or maps of classes."""

    def __init__(self, maps: bool = False):
        super().__init__()
        self.maps = maps

    def forward(self, inputs, labels, mode="tensor"):
        outputs = super().forward(inputs.flatten(1)[:, :4], labels, mode)
        if mode == "predict" and self.maps:
            classes = torch.arange(54).reshape(6, 9) % 3
            return [
                SimpleNamespace(
                    pred_label=sample["pred_label"],
                    gt_label=sample["gt_label"],
                    img_path=f"/data/{index}.jpg",
                    pred_sem_seg=SimpleNamespace(data=classes[None]),
                    gt_sem_seg=SimpleNamespace(data=classes[None].flip(1)),
                    __getitem__=None,
                )
                for index, sample in enumerate(outputs)
            ]
        return outputs


def cfg(folder, hook, *, maps: bool = False, **changes: Any) -> dict[str, Any]:
    data = {**loader(20, 8, shuffle=False), "dataset": dict(type=Pictures, size=20)}
    return config(
        folder,
        **{
            **dict(
                model=dict(type=PictureNet, maps=maps),
                train_dataloader=data,
                val_dataloader=data,
                val_evaluator=[],
                param_scheduler=None,
                train_cfg=dict(by_epoch=True, max_epochs=2),
                default_hooks=dict(visualization=hook),
            ),
            **changes,
        },
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "vis_data" / "vis_image").glob("*"))


def test_some_images_of_every_so_many_batches(tmp_path):
    train(cfg(tmp_path, dict(type="VisualizationHook", enable=True, interval=2, max_images=3)))
    assert names(tmp_path) == sorted(f"val_1_{image}_{step}.png" for image in (0, 1, 2) for step in (3, 6))
    picture = matplotlib_image.imread(tmp_path / "vis_data" / "vis_image" / "val_1_0_3.png")
    assert picture.shape == (340, 300, 4) and picture.std() > 0.1


def test_it_is_off_unless_asked_for(tmp_path):
    train(cfg(tmp_path, dict(type="VisualizationHook")))
    train(cfg(tmp_path, dict(type="SegVisualizationHook")))
    assert names(tmp_path) == []


def test_maps_of_classes_are_drawn_beside_the_image(tmp_path):
    train(cfg(tmp_path, dict(type="SegVisualizationHook", draw=True, interval=1, max_images=1), maps=True))
    assert names(tmp_path) == ["val_0.jpg_3.png", "val_0.jpg_6.png"]
    picture = matplotlib_image.imread(tmp_path / "vis_data" / "vis_image" / "val_0.jpg_6.png")
    assert picture.shape == (340, 900, 4)
    colours = {tuple(pixel) for pixel in picture[100:240, 300:600].reshape(-1, 4).round(2).tolist()}
    assert len(colours - {(1.0, 1.0, 1.0, 1.0)}) >= 3


def test_in_a_test_too(tmp_path):
    hook = dict(type="VisualizationHook", enable=True, interval=3)
    settings = cfg(tmp_path, hook)
    settings.update(test_dataloader=settings["val_dataloader"], test_cfg={}, test_evaluator=[])
    train(settings).test()
    assert [name for name in names(tmp_path) if name.startswith("test")] == [f"test_2_{i}_6.png" for i in range(4)]


def test_tensorboard_has_them_as_well(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'fusedopt[engine]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    hook = dict(type="VisualizationHook", enable=True, interval=2, max_images=1)
    train(cfg(tmp_path, hook, visualizer=dict(vis_backends=backends)))
    events = EventAccumulator(str(tmp_path / "vis_data"))
    events.Reload()
    assert [event.step for event in events.Images("val_1_0")] == [3, 6]
    assert (events.Images("val_1_0")[0].width, events.Images("val_1_0")[0].height) == (300, 340)


class Kept(LocalVisBackend):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("")
        self.images: dict[str, Any] = {}
        self.numbers: list[tuple[dict[str, float], int]] = []

    def add_image(self, name, image, step):
        self.images[name, step] = image

    def add_scalars(self, scalars, step):
        self.numbers.append((dict(scalars), step))


class TestVisualizer:
    @pytest.mark.parametrize(
        "image",
        [
            torch.zeros(5, 7),
            torch.zeros(5, 7, dtype=torch.uint8),
            torch.zeros(5, 7, 3, dtype=torch.uint8).numpy(),
            torch.zeros(1, 5, 7),
            torch.zeros(3, 5, 7, requires_grad=True),
        ],
        ids=["grey", "uint8", "array", "one channel first", "channels first"],
    )
    def test_images_of_every_form(self, image):
        kept = Kept()
        Visualizer([kept]).add_image("it", image, step=3)
        picture = kept.images["it", 3]
        assert picture.shape == (5, 7, 3) and str(picture.dtype) == "uint8"

    def test_floats_are_scaled_to_black_and_white(self):
        kept = Kept()
        Visualizer([kept]).add_image("it", torch.tensor([[-2.0, 0.0], [2.0, 1.0]]))
        assert kept.images["it", 0][..., 0].tolist() == [[0, 128], [255, 191]]

    def test_what_is_no_image(self):
        with pytest.raises(ValueError, match=r"an image has height x width.* got shape \(4, 5, 7\)"):
            Visualizer([Kept()]).add_image("it", torch.zeros(4, 5, 7))

    def test_numbers(self):
        kept = Kept()
        visualizer = Visualizer([kept])
        visualizer.add_scalar("loss", torch.tensor(0.5), step=2)
        visualizer.add_scalars(dict(lr=0.1, epoch=3), step=4)
        assert kept.numbers == [(dict(loss=0.5), 2), (dict(lr=0.1, epoch=3), 4)]

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            (dict(), ["pred_label: 1 (dog)", "pred_score: 0.25", "gt_label: 0 (cat)", "name: x"]),
            (dict(draw_gt=False), ["pred_label: 1 (dog)", "pred_score: 0.25", "name: x"]),
            (dict(draw_pred=False), ["gt_label: 0 (cat)"]),
        ],
    )
    def test_the_text_above_an_image(self, settings, text, monkeypatch):
        from matplotlib.figure import Figure

        titles = []
        monkeypatch.setattr(Figure, "suptitle", lambda figure, title, **kwargs: titles.append(title))
        visualizer = Visualizer([Kept()])
        visualizer.dataset_meta = dict(classes=["cat", "dog"])
        sample = dict(
            pred_label=torch.tensor([1]), pred_score=0.25, gt_label=torch.tensor(0), name="x", features=torch.ones(9)
        )
        visualizer.add_datasample("it", torch.zeros(4, 4), data_sample=sample, **settings)
        assert titles[0].splitlines() == text

    def test_a_slash_in_a_name_makes_no_folder(self, tmp_path):
        Visualizer(save_dir=tmp_path).add_image("val/a/b.png", torch.zeros(2, 2))
        assert [path.name for path in (tmp_path / "vis_image").iterdir()] == ["val_a_b.png_0.png"]


@pytest.mark.parametrize(
    ("hook", "settings", "error", "message"),
    [
        (VisualizationHook, dict(interval=0), ValueError, "Invalid interval: 0"),
        (VisualizationHook, dict(max_images="3"), TypeError, "Invalid max_images: '3'"),
        (VisualizationHook, dict(show=True), ValueError, "show=True needs a window"),
        (SegVisualizationHook, dict(show=True), ValueError, "show=True needs a window"),
    ],
)
def test_wrong_settings(hook, settings, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hook(**settings)


def test_a_batch_without_images(tmp_path):
    runner = SimpleNamespace(rank=0, visualizer=Visualizer([Kept()]), val_dataloader=SimpleNamespace(dataset=None))
    hook = VisualizationHook(enable=True, interval=1)
    with pytest.raises(KeyError, match=r"images to draw must be in data_batch\['inputs'\]; the batch has 'imgs'"):
        hook.after_val_iter(runner, batch_idx=0, data_batch=dict(imgs=torch.zeros(1, 4, 4)), outputs=[1])


@pytest.mark.parametrize(
    ("module", "extra", "draw"),
    [
        ("matplotlib", "plot", lambda path: Visualizer(save_dir=path).add_image("it", torch.zeros(2, 2))),
        ("tensorboard", "engine", lambda path: Visualizer([dict(type="TensorboardVisBackend")], save_dir=path)),
    ],
)
def test_what_is_missing_is_said(module, extra, draw, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'fusedopt[{extra}]'")):
        draw(tmp_path)
