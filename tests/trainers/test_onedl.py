"""onedl-mmengine, the maintained fork of MMEngine: what the tests of MMEngine say holds there too.

It takes the package name ``mmengine``, so it cannot be installed beside MMEngine. The test starts a process that finds
it first, in the folder that FUSEDOPT_ONEDL names: ``pip install --no-deps --target FOLDER onedl-mmengine``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
FOLDER = os.environ.get("FUSEDOPT_ONEDL")

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")

#: Classes of test_mmengine.py; without tests that start a process, which take long.
TESTED = ["TestThreeWays", "TestMixedPrecision", "TestCheckpoints"]
LEFT_OUT = "not new_process and not says_that"

# First the tests of MMEngine. Then runs are resumed: MMEngine 0.10.7 needs TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD for that.
# The fork does not, with our classes as with its own.
CODE = f"""
import sys, tempfile
from pathlib import Path

sys.modules["torchvision"] = None  # not used, and may be one that does not load here
import mmengine, pytest

assert mmengine.__file__.startswith({FOLDER!r}), mmengine.__file__
tests = [{str(TESTS / "test_mmengine.py")!r} + "::" + name for name in {TESTED!r}]
failed = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", {str(TESTS.parent)!r}, "-k", {LEFT_OUT!r}, *tests])
if failed:
    sys.exit(failed)

import test_mmengine as t

ours = t.INTEGRATION, "optim_wrapper.type=FusedOptimWrapper", "optim_wrapper.optimizer.type=FusedAdamW"
for imports, *options in ("",), ours:
    with tempfile.TemporaryDirectory() as folder:
        t.run(t.load(Path(folder), *options, "train_cfg.max_epochs=3", imports=imports))
        cfg = t.load(Path(folder), *options, imports=imports)
        cfg.resume = True
        runner = t.run(cfg)
        assert runner.epoch == 4
        assert any("resumed epoch: 3" in line for line in t.log_of(runner))
        assert not any("Could not safely load" in line for line in t.log_of(runner))
print("resumed")
"""


@pytest.mark.skipif(not FOLDER, reason="FUSEDOPT_ONEDL does not name a folder with onedl-mmengine")
def test_its_runner_trains_in_the_three_ways_and_resumes() -> None:
    path = os.pathsep.join([str(FOLDER), str(TESTS), str(TESTS.parent), os.environ["PYTHONPATH"]])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for name in [*env]:
        if name.startswith(("PYTEST_", "TORCH_FORCE_")):
            del env[name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "resumed"
    (passed,) = [line for line in lines if " passed" in line]
    assert "skipped" not in passed and int(passed.split(" passed")[0]) >= 18
