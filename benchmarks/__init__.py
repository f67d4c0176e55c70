"""The benchmark suite. `make bench` runs a selection, `make bench-full` all of it, `make bench-gate` the floors."""
