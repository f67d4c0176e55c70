"""Peak memory of a phase of a program."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


def _resident_kib() -> dict[str, int]:
    """The resident set now (``VmRSS``) and its highest since it was reset (``VmHWM``)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    fields = (line.split() for line in status.splitlines())
    return {field[0].rstrip(":"): int(field[1]) for field in fields if field[0] in ("VmRSS:", "VmHWM:")}


class PeakMemory:
    """Memory that a phase takes at its peak, beyond what was in use when it began.

    On CUDA it counts what torch's allocator hands out. On a CPU it is the growth of the resident set, which Linux
    counts in pages and keeps per thread: differences below about half a MiB mean nothing.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Begin the phase."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        try:
            # glibc keeps freed memory and would serve the phase from it, unseen: give it back first.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self._before = _resident_kib()["VmRSS"]
        except (AttributeError, OSError, KeyError, TypeError):
            self._before = -1

    def stop(self) -> int | None:
        """End the phase and return its peak in bytes, or None if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return None if self._before < 0 else max(0, _resident_kib()["VmHWM"] - self._before) * 1024
