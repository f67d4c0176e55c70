"""Files with tensors from anywhere, read without running anything in them."""

from .files import Contents, read_file
from .standins import StandIn
from .weights import Weights, find_weights

__all__ = ["Contents", "StandIn", "Weights", "find_weights", "read_file"]
