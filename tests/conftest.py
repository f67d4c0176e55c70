from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import ISAS, module


@pytest.fixture(autouse=True)
def _restore_globals() -> Iterator[None]:
    """Each test starts with one seed, the default number of threads and the best instruction set."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    if module is not None:
        module.use_cpu_isa(ISAS[-1])
