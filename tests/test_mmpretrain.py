"""MMPretrain's wheel ships hundreds of real configs: the groups of all that can be built here are MMEngine's."""

from __future__ import annotations

import pytest
from mmpretrain_zoo import SAME, missing, outcomes

pytestmark = [
    pytest.mark.slow,
    # The models of others warn of much.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


def test_the_groups_of_its_configs_are_the_same() -> None:
    found = outcomes()
    counts = {outcome: len(names) for outcome, names in found.items()}
    assert not {outcome: names for outcome, names in found.items() if "other" in outcome}, counts
    assert counts[SAME] >= 400, counts
