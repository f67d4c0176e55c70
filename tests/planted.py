"""Pickles and archives that were made to do harm, by technique; none of them needs to be believed.

The techniques are those that are publicly known: functions that run something, reached through every instruction that
calls, and data that make a reader hang, crash or use up memory.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

__all__ = ["FUNCTIONS", "PICKLES", "archive", "calls", "old_file"]

#: Functions that run something, and what they would be called with.
FUNCTIONS = {
    **{f"{module}.system": ("touch ran",) for module in ("os", "posix", "nt")},
    "os.execv": ("/bin/touch", ["touch", "ran"]),
    "os.popen": ("touch ran",),
    "os.spawnlp": (0, "touch", "touch", "ran"),
    "os.remove": ("ran",),
    "subprocess.Popen": (["touch", "ran"],),
    "subprocess.check_output": (["touch", "ran"],),
    "commands.getoutput": ("touch ran",),
    "pty.spawn": (["touch", "ran"],),
    "builtins.eval": ("open('ran', 'w')",),
    "builtins.exec": ("open('ran', 'w')",),
    "builtins.compile": ("1", "", "eval"),
    "builtins.open": ("ran", "w"),
    "builtins.__import__": ("antigravity",),
    "builtins.getattr": ("os", "system"),
    "builtins.breakpoint": (),
    "builtins.map": ("print", [1]),
    "builtins.bytearray": (10**13,),
    "builtins.range": (10**13,),
    "__builtin__.execfile": ("ran",),
    "importlib.import_module": ("this",),
    "runpy.run_module": ("this",),
    "runpy._run_code": ("open('ran', 'w')", {}),
    "code.interact": (),
    "codeop.compile_command": ("1",),
    "timeit.timeit": ("open('ran', 'w')",),
    "cProfile.run": ("open('ran', 'w')",),
    "pdb.run": ("open('ran', 'w')",),
    "bdb.Bdb.run": ("open('ran', 'w')",),
    "doctest.debug_script": ("open('ran', 'w')",),
    "functools.partial": ("print",),
    "operator.attrgetter": ("system",),
    "operator.methodcaller": ("system", "touch ran"),
    "types.CodeType": (),
    "types.FunctionType": (),
    "marshal.loads": (b"\xe3",),
    "pickle.loads": (pickle.dumps(1),),
    "_pickle.loads": (pickle.dumps(1),),
    "shelve.open": ("ran",),
    "ctypes.CDLL": ("libc.so.6",),
    "shutil.rmtree": ("ran",),
    "shutil.copy": ("ran", "ran too"),
    "socket.create_connection": (("127.0.0.1", 9),),
    "urllib.request.urlopen": ("http://127.0.0.1:9",),
    "webbrowser.open": ("http://127.0.0.1:9",),
    "http.client.HTTPSConnection": ("127.0.0.1",),
    "smtplib.SMTP": ("127.0.0.1",),
    "logging.config.listen": (),
    "multiprocessing.util.spawnv_passfds": (b"touch", ["ran"], []),
    "asyncio.run": (1,),
    "numpy.load": ("ran",),
    "numpy.testing._private.utils.runstring": ("open('ran', 'w')", {}),
    "torch.load": ("ran",),
    "torch.jit.load": ("ran",),
    "torch.hub.load": ("ran", "ran"),
    "torch.storage._load_from_bytes": (b"ran",),
    "torch.utils.cpp_extension.load_inline": ("ran", ""),
    "torch.utils.collect_env.run": ("touch ran",),
    "torch.serialization.add_safe_globals": ([],),
    "torch._utils._rebuild_wrapper_subclass": (1,),
    "torch.fx.graph_module.reduce_graph_module": ({}, ""),
    "torch.package.PackageImporter": ("ran",),
    "fusedopt.cli.main.main": (["info"],),
    "fusedopt.training.config.config.Config.fromfile": ("ran.py",),
}


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def _pickled(value: object) -> bytes:
    """The instructions for a value, without the first and the last one."""
    return pickle.dumps(value, 2)[2:-1]


def calls(path: str, arguments: tuple[object, ...]) -> dict[str, bytes]:
    """Pickles that call a function, one through each instruction that calls."""
    module, _, name = path.rpartition(".")
    named, given = f"c{module}\n{name}\n".encode(), _pickled(arguments)
    separate = b"".join(map(_pickled, arguments))
    return {
        "REDUCE": b"\x80\x02" + named + given + b"R.",
        "STACK_GLOBAL": b"\x80\x04" + _text(module) + _text(name) + b"\x93" + given + b"R.",
        "NEWOBJ": b"\x80\x02" + named + given + b"\x81.",
        "NEWOBJ_EX": b"\x80\x04" + named + given + b"}\x92.",
        "INST": b"(" + separate + f"i{module}\n{name}\n".encode() + b".",
        "OBJ": b"(" + named + separate + b"o.",
        "BUILD": b"\x80\x02" + named + b")\x81" + _pickled({"__setstate__": 1, "__class__": 2}) + b"b.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n"
        + f"c{module}\n__dict__\n".encode()
        + _text(name)
        + b"\x86R"
        + given
        + b"R.",
        "inside": b"\x80\x02}" + _text("state_dict") + b"}" + _text("w") + named + given + b"Rss.",
        "as a key": b"\x80\x02}" + named + given + b"RK\x01s.",
        "as a reference": b"\x80\x02" + named + given + b"RQ.",
        "as a storage": b"\x80\x02(" + _text("storage") + named + _text("0") + _text("cpu") + b"K\x01tQ.",
        "as a factory": b"\x80\x02ccollections\ndefaultdict\n" + named + b"\x85R" + _text("a") + b"K\x01s.",
    }


def _repeated(start: bytes, wrap: Callable[[bytes], bytes], count: int) -> bytes:
    for _ in range(count):
        start = wrap(start)
    return start


def _bare_tensor(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4, key: str = "0"
) -> bytes:
    """The instructions for a tensor in a storage of ``count`` float32, as ``torch.save`` writes them."""
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu") + _pickled(count) + b"tQ"
    arguments = b"(" + storage + _pickled(offset) + _pickled(size) + _pickled(stride) + b"\x89N" + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _tensor(*settings: tuple[int, ...], **more: Any) -> bytes:
    return b"\x80\x02}" + _text("w") + _bare_tensor(*settings, **more) + b"s."


#: Keeps a tuple, number 60, each level of which refers twice to the one before.
_LAUGHS = (
    b"\x80\x04()q\x00"
    + b"".join((b"h" + bytes([level])) * 2 + b"\x86q" + bytes([level + 1]) for level in range(60))
    + b"1"
)


def _again(kept: bytes, use: bytes, count: int = 20_000) -> bytes:
    """A value that is kept, and then used again and again; ``use`` begins with getting it."""
    return b"\x80\x04" + kept + b"q\x00" + use * count + b"."


#: One element, said to be more than there are atoms in a grain of sand.
_EXPANDED = _bare_tensor((7,) * 20, (0,) * 20)

#: Pickles that make a reader hang, crash, or use up memory, or that are just not right.
PICKLES = {
    "empty": b"",
    "only STOP": b".",
    "no STOP": b"\x80\x02}",
    "an unknown instruction": b"\x80\x02\xff.",
    "a protocol of the future": b"\x80\x63}.",
    "cut in a string": b"\x80\x02X\xff\xff\x00\x00abc",
    "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "dicts in dicts": b"\x80\x02" + b"}K\x01" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "frozensets in frozensets": b"\x80\x04" + b"(" * 100_000 + b"\x91" * 100_000 + b".",
    "marks": b"(" * 100_000 + b".",
    "objects in objects": b"\x80\x02" + b"cos\nsystem\n" * 20_000 + b")R" + b"\x85R" * 19_999 + b".",
    "states in states": b"\x80\x02" + b"ca\nb\n)R" * 20_000 + b"b" * 19_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dict in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "a tuple of a list of itself": b"\x80\x02]q\x00h\x00\x85a.",
    "a deep key": b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.",
    "shared tuples": _LAUGHS + b"h<.",
    "shared tuples as a key": _LAUGHS + b"}h<K\x01s.",
    "shared tuples in a set": _LAUGHS + b"\x8f(h<\x90.",
    "shared lists": b"\x80\x02(]q\x00"
    + b"".join(b"]q" + bytes([level + 1]) + (b"h" + bytes([level]) + b"a") * 2 for level in range(60)) + b"1h<.",
    "a list as a key": b"\x80\x02}]K\x01s.",
    "a dict in a set": b"\x80\x04\x8f(}\x90.",
    "terabytes of bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**42) + b"abc.",
    "terabytes of text": b"\x80\x04\x8d" + struct.pack("<Q", 2**42) + b"abc.",
    "terabytes of a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**42) + b"abc.",
    "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc.",
    "gigabytes of bytes": b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "gigabytes of an integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"abc.",
    "a frame of exabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
    "a memo of billions": b"\x80\x02}r\xff\xff\xff\xff.",
    "a memo of trillions": b"}p1000000000000\n.",
    "an integer of a million bits": b"\x80\x02\x8b" + struct.pack("<i", 125_000) + b"\x7f" * 125_000 + b".",
    "an integer of 5,000 digits": b"I" + b"9" * 5_000 + b"\n.",
    "a long of 5,000 digits": b"L" + b"9" * 5_000 + b"L\n.",
    "an integer that is none": b"Iabc\n.",
    "a float that is none": b"Fabc\n.",
    "a string without quotes": b"Sabc\n.",
    "text that is no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "a key of a thousand bits": b"\x80\x02}\x8a\x80" + b"\x7f" * 128 + b"K\x01s.",
    "a value that was never kept": b"\x80\x02h\x07.",
    "taking from nothing": b"0.",
    "appending to nothing": b"\x80\x02a.",
    "appending to a number": b"\x80\x02K\x01K\x02a.",
    "setting items of a list": b"\x80\x02]K\x01K\x02s.",
    "half an item": b"\x80\x02}(K\x01u.",
    "items without a mark": b"\x80\x02}K\x01u.",
    "calling without arguments": b"\x80\x02cos\nsystem\nR.",
    "calling with a list": b"\x80\x02cos\nsystem\n]R.",
    "calling a number": b"\x80\x02K\x01)R.",
    "calling a dtype": b"\x80\x02ctorch\nfloat32\n)R.",
    "calling a result": b"\x80\x02cos\nsystem\n)R)R)R.",
    "a name that is a number": b"\x80\x04K\x01K\x02\x93.",
    "a name of two lines": b"\x80\x04" + _text("os\n\x1b[2Jsystem") + _text("sys\ntem") + b"\x93)R.",
    "a name of a surrogate": b"\x80\x04" + _text("os\ud800") + _text("sys\udfff") + b"\x93)R.",
    "a key of two lines": b"\x80\x02}" + _text("state\n\x1b[31m_dict\u2028") + b"K\x01s.",
    "an extension": b"\x80\x02\x82\xf0)R.",
    "an extension of two bytes": b"\x80\x02\x83\xf0\x00)R.",
    "an extension of four bytes": b"\x80\x02\x84\xf0\x00\x00\x00)R.",
    "a buffer outside": b"\x80\x05\x97.",
    "a buffer outside to read": b"\x80\x05\x97\x98.",
    "a reference in text": b"P/etc/passwd\n.",
    "a reference to a number": b"\x80\x02K\x01Q.",
    "a reference to a list": b"\x80\x02](K\x01K\x02eQ.",
    "the storage of another folder": _tensor((1,), (1,), key="../../../etc/passwd"),
    "the storage of another name": _tensor((1,), (1,), key="1\n2"),
    "more storage than there is": _tensor((4,), (1,), count=2**40),
    "a negative storage": _tensor((4,), (1,), count=-4),
    "more elements than the storage": _tensor((2**40,), (1,)),
    "an offset beyond the storage": _tensor((1,), (1,), offset=2**61),
    "a negative offset": _tensor((1,), (1,), offset=-1),
    "a negative size": _tensor((-1,), (1,)),
    "a negative stride": _tensor((4,), (-1,)),
    "a stride beyond the storage": _tensor((2, 2), (2**40, 1)),
    "a size that overflows": _tensor((2**62, 2**62), (0, 0)),
    "fewer strides than sizes": _tensor((2, 2), (1,)),
    "thousands of dimensions": _tensor((1,) * 5_000, (0,) * 5_000),
    "a tensor without storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)(t\x89Nt0)R.",
    "a tensor with too few arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a parameter of a number": b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",
    "a state of a tensor": _tensor((1,), (1,))[:-2] + _pickled({"__class__": 1, "data": 2}) + b"bs.",
    "attributes of a dict": b"\x80\x02ccollections\nOrderedDict\n)R" + _pickled({"items": 1, "__class__": 2}) + b"b.",
    "versions that are none": b"\x80\x02ccollections\nOrderedDict\n)R" + _pickled({"_metadata": [1]}) + b"b.",
    "a device that is none": b"\x80\x02ctorch\ndevice\n" + _text("/etc/passwd") + b"\x85R.",
    "a layout that is none": b"\x80\x02ctorch.serialization\n_get_layout\n" + _text("torch.hub") + b"\x85R.",
    "a size of text": b"\x80\x02ctorch\nSize\n" + _text("ab") + b"\x85\x85R.",
    "bytes in another encoding": b"\x80\x02c_codecs\nencode\n" + _text("ab") + _text("zlib") + b"\x86R.",
    "a number of NumPy of another length": b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
    + _pickled(("f8", 0, 1)) + b"R" + _text("abc") + b"\x86R.",
    "an object array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\n"
    + _text("b") + b"\x85R\x87R(K\x01K\x01\x85cnumpy\ndtype\n" + _pickled(("O8", 0, 1)) + b"R\x89]tb.",
    "a long name again and again": _again(_text("m" * 900_000), b"h\x00X\x01\x00\x00\x00f\x93"),
    "a long text encoded again and again": _again(_text("t" * 900_000), b"c_codecs\nencode\nh\x00\x85R"),
    "long arguments again and again": _again(b"(" + b"N" * 900_000 + b"t", b"ca\nb\nh\x00}\x92"),
    "counts of counts": _again(_pickled(dict.fromkeys(range(100_000))), b"ccollections\nCounter\nh\x00\x85R", 300),
    "equal keys": b"\x80\x04}" + (_text("k" * 100_000) + b"q\x00N") + b"s" + b"h\x00Ns" * 5_000 + b".",
    "a long key": b"\x80\x04}" + _text("k" * 1_000_000) + b"Ns.",
    "an item twice": b"\x80\x02}K\x01K\x02sK\x01K\x03s.",
    "numbers that are found slowly": b"\x80\x02}("
    + b"".join(_pickled(2**40 * number) + b"N" for number in range(30_000)) + b"u.",
    "a long key of many numbers": b"\x80\x02}" + _pickled(tuple(range(1_000))) + b"Ns.",
    "a tensor as a key": b"\x80\x02}" + _EXPANDED + b"Ns.",
    "a tensor in a key": b"\x80\x02}" + _EXPANDED + b"\x85Ns.",
    "a storage as a key": b"\x80\x02}(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu")
    + b"K\x04tQNs.",
    "a tensor of another dtype": b"\x80\x02}" + _text("w")
    + b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + _EXPANDED + b"ctorch\nfloat64\n" + _text("cpu")
    + b"\x89tRs.",
    "many lists under a long key": b"\x80\x02}" + _text("k" * 4_000) + b"](" + b"N" * 400_000 + b"es.",
    "counts in an encoding": b"\x80\x02ccollections\nCounter\n" + _text("abc") + b"\x85R.",
    "a set of lists": b"\x80\x02cbuiltins\nset\n" + _pickled([[[1]]]) + b"\x85R.",
    "a set of gigabytes": b"\x80\x02cbuiltins\nset\n" + _pickled(10**12) + b"\x85R.",
    "a bytearray of gigabytes": b"\x80\x02cbuiltins\nbytearray\n" + _pickled(10**12) + b"\x85R.",
    "bytes of gigabytes": b"\x80\x02cbuiltins\nbytes\n" + _pickled(10**12) + b"\x85R.",
    "a complex number of text": b"\x80\x02cbuiltins\ncomplex\n" + _text("1" * 100) + b"\x85R.",
    "a sparse tensor of numbers": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n" + _pickled((1, (2, 3, 4))) + b"R.",
    "a tensor of another class": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\npopen\n"
    + _pickled(("touch ran",)) + b"}tR.",
    "a module without a class": b"\x80\x02(" + _text("module") + b"NNNtQ.",
    "a class with a source": b"\x80\x02(" + _text("module") + b"cos\nsystem\n" + _text("a") + _text("b") + b"tQ)R.",
    "counts of a list": b"\x80\x02ccollections\nCounter\n]\x85R.",
    "pairs of one": b"\x80\x02ccollections\nOrderedDict\n" + _pickled([[1]]) + b"\x85R.",
}  # fmt: skip


def archive(content: bytes, **changes: bytes | None) -> bytes:
    """``content`` as the pickle in a file of ``torch.save``."""
    file = io.BytesIO()
    entries = {"data.pkl": content, "byteorder": b"little", "data/0": bytes(16), "version": b"3\n", **changes}
    with zipfile.ZipFile(file, "w") as written:
        for name, entry in entries.items():
            if entry is not None:
                written.writestr(f"archive/{name}", entry)
    return file.getvalue()


def old_file(content: bytes) -> bytes:
    """``content`` as the pickle in a file of ``torch.save`` before version 1.6."""
    head = [0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={})]
    keys, stored = (["0"], struct.pack("<q", 4) + bytes(16)) if b"FloatStorage" in content else ([], b"")
    return b"".join(pickle.dumps(part, 2) for part in head) + content + pickle.dumps(keys, 2) + stored
