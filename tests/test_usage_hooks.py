"""Usage from the MMEngine family's documentation and courses: hooks."""

from __future__ import annotations

import io
import os.path as osp
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from engine_cases import by_iterations, config, train

from fusedopt.training import engine
from fusedopt.training.engine import Hook, Runner, Visualizer
from fusedopt.training.registry import HOOKS, Registry

DEFAULT_HOOKS = """
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=32000),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
"""

CUSTOM_HOOKS = """
custom_hooks = [
    dict(type='EMAHook', start_iters=500, priority='NORMAL')
]
"""

SEG_VISUALIZATION_HOOK = """
...
@HOOKS.register_module()
class SegVisualizationHook(Hook):
    ...
    def _after_iter(self,
                    runner: Runner,
                    batch_idx: int,
                    data_batch: dict,
                    outputs: Sequence[SegDataSample],
                    mode: str = 'val') -> None:
        ...
        # skip while training, or when self.draw is False
        if self.draw is False or mode == 'train':
            return
        ...
        if self.every_n_inner_iters(batch_idx, self.interval):
            for output in outputs:
                img_path = output.img_path
                img_bytes = self.file_client.get(img_path)
                img = mmcv.imfrombytes(img_bytes, channel_order='rgb')
                window_name = f'{mode}_{osp.basename(img_path)}'
                self._visualizer.add_datasample(
                    window_name,
                    img,
                    data_sample=output,
                    show=self.show,
                    wait_time=self.wait_time,
                    step=runner.iter)
"""


def run(fragment: str, **names: object) -> dict[str, object]:
    namespace = dict(names)
    exec(fragment, namespace)
    return namespace


def order(runner: Runner) -> list[tuple[str, int]]:
    return [(type(hook).__name__, engine.hooks.get_priority(hook.priority)) for hook in runner.hooks]


def test_the_default_hooks_of_a_segmentation(tmp_path):
    hooks = run(DEFAULT_HOOKS)["default_hooks"]
    runner = train(config(tmp_path, **by_iterations(default_hooks=hooks)))
    assert order(runner)[:-1] == [
        ("RuntimeInfoHook", 10),
        ("IterTimerHook", 50),
        ("DistSamplerSeedHook", 50),
        ("SegVisualizationHook", 50),
        ("LoggerHook", 60),
        ("ParamSchedulerHook", 70),
        ("CheckpointHook", 90),
    ]
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_20.pth"]


def test_the_average_of_the_weights_as_a_custom_hook(tmp_path):
    hooks = run(CUSTOM_HOOKS)["custom_hooks"]
    runner = Runner.from_cfg(config(tmp_path, custom_hooks=hooks))
    (hook,) = (hook for hook in runner.hooks if type(hook).__name__ == "EMAHook")
    assert hook.begin_iter == 500 and hook.priority == "NORMAL"
    hooks[0]["start_iters"] = 10
    train(config(tmp_path, custom_hooks=hooks))
    assert "ema_state_dict" in torch.load(tmp_path / "epoch_4.pth", weights_only=True)


@pytest.mark.parametrize("mode", ["val", "test"])
def test_a_hook_that_draws_class_maps(tmp_path, mode):
    """In a registry of its own, as MMSegmentation's is: the name is taken here."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed: pip install 'fusedopt[plot]'")
    file = io.BytesIO()
    image.imsave(file, torch.rand(6, 9, 3).numpy(), format="png")
    child = Registry("hook", parent=HOOKS, scope=f"seg_{mode}")

    def decode(content: bytes, channel_order: str):
        assert channel_order == "rgb"
        return image.imread(io.BytesIO(content), format="png")[..., :3]

    class SegDataSample(SimpleNamespace):
        pass

    try:
        run(
            SEG_VISUALIZATION_HOOK,
            HOOKS=child,
            Hook=Hook,
            Runner=Runner,
            Sequence=Sequence,
            SegDataSample=SegDataSample,
            mmcv=SimpleNamespace(imfrombytes=decode),
            osp=osp,
        )
        hook = HOOKS.build(dict(type=f"seg_{mode}.SegVisualizationHook"))
    finally:
        del HOOKS.children[child.scope]
    hook.draw, hook.interval, hook.show, hook.wait_time = True, 2, False, 0.0
    hook.file_client = SimpleNamespace(get=lambda path: file.getvalue())
    hook._visualizer = Visualizer(save_dir=tmp_path)

    classes = torch.arange(54).reshape(6, 9) % 4
    outputs = [SegDataSample(img_path=f"/data/{name}", pred_sem_seg=SimpleNamespace(data=classes)) for name in "ab"]
    runner = SimpleNamespace(iter=7)
    hook.after_train_iter(runner, batch_idx=1, data_batch={}, outputs={})
    for batch_idx in range(3):
        getattr(hook, f"after_{mode}_iter")(runner, batch_idx=batch_idx, data_batch={}, outputs=outputs)
    assert sorted(path.name for path in (tmp_path / "vis_image").iterdir()) == [f"{mode}_a_7.png", f"{mode}_b_7.png"]
