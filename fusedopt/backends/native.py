"""The native backend."""
from .reference import ReferenceBackend
class NativeBackend(ReferenceBackend):
    name = "native"
    @classmethod
    def unavailable(cls, device):
        return "not built"
