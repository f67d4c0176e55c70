"""The benchmark suite, with more contenders than `fusedopt bench` has: other packages, and what users do by hand.

`make bench` runs a selection, `make bench-full` all of it, `make bench-gate` the floors. `python -m benchmarks` takes
the arguments of `fusedopt bench`.
"""

from . import in_backward, kept, peers, tricks  # noqa: F401  they add their contenders
