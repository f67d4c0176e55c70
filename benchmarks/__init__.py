"""Benchmarks of the optimizer step against torch's own, interleaved in one process. Run `python -m benchmarks`."""
