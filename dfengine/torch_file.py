"""Reads `torch.save` files without running them: the untrusted half of `dfengine convert`.

A torch.save file is a pickle beside the raw bytes of its tensors' storages, in a zip archive or, from torch before
1.6, in one bare stream. A pickle is a program, so it is run here in a machine with almost no instructions:

- every global is looked up in one table (`_GLOBALS`), never imported; the entries are inert stand-ins of this module,
  and any other name is refused by that name;
- a tensor becomes a `TensorRecord`, which says where its bytes lie, checked against the size of its storage;
- a dictionary's key must be a str or an int: a few bytes of pickle make tuples so deep, or so often shared, that
  hashing them overflows the stack or never ends, and nothing else here looks into a tuple from a file;
- bytes are read only when `tensor` is called, so that the caller decides which and how many.

Everything that can be wrong with a file raises `CheckpointError`, whose message does not name the file.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import torch

from dfengine.errors import CheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_PICKLE_BYTES = 32 << 20
_MAX_INSTRUCTIONS = 1 << 20  # about 30 a tensor are used

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def printable(text: str) -> str:
    """Text from a file as part of a message: one line of ASCII, of bounded length."""
    shown = text[:200].encode("unicode_escape").decode()
    return shown if len(shown) <= 200 else shown[:197] + "..."


def _is_count(value: object) -> bool:
    """Whether `value` can be a number of elements in a file; larger ones could not even be printed."""
    return type(value) is int and 0 <= value < 2**48


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class TensorRecord(NamedTuple):
    """A tensor that has not been read: the elements `offset + sum(index * stride)` of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Builtin:
    """Stands for a builtin type used as a default factory. Deliberately not callable."""

    __slots__ = ()


# The callables below are instances without attributes: a pickle can set attributes on what it looks up, and there
# must be nothing on them to change.


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None):
        if type(storage) is not _Storage:
            raise CheckpointError("a tensor without a storage")
        if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > 8:
            raise CheckpointError("a tensor whose shape and strides do not fit each other")
        if not all(map(_is_count, (offset, *shape, *stride))) or 0 in shape:
            raise CheckpointError("a tensor with an offset, shape or stride out of range")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.numel or last >= storage.numel:
            raise CheckpointError(
                f"a tensor of shape {shape}, strides {stride} and offset {offset} reaches past its storage of "
                f"{storage.numel} elements"
            )
        return TensorRecord(storage, offset, shape, stride)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data, requires_grad=False, hooks=None):
        if type(data) is not TensorRecord:
            raise CheckpointError("a parameter without a tensor")
        return data


def _check_keys(keys: Iterable) -> None:
    if not all(type(key) in (str, int) for key in keys):
        raise CheckpointError("a dictionary with a key that is neither text nor a whole number")


class _MakeOrderedDict:
    __slots__ = ()

    def __call__(self, items=()):
        if type(items) not in (list, tuple) or not all(type(i) in (list, tuple) and len(i) == 2 for i in items):
            raise CheckpointError("an OrderedDict of something other than pairs")
        _check_keys(key for key, _ in items)
        return collections.OrderedDict(items)


class _MakeDefaultDict:
    __slots__ = ()

    def __call__(self, factory=None):
        if factory is not None and type(factory) is not _Builtin:
            raise CheckpointError("a defaultdict whose factory is not a builtin type")
        return {}


_GLOBALS: Mapping[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("collections", "OrderedDict"): _MakeOrderedDict(),
    ("collections", "defaultdict"): _MakeDefaultDict(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGE_DTYPES.items()},
    **{
        (module, name): _Builtin()
        for module in ("builtins", "__builtin__")
        # Protocol 2, which torch.save uses, writes str and int under their Python 2 names.
        for name in ("bool", "dict", "float", "int", "list", "long", "str", "tuple", "unicode")
    },
}


class _Unpickler(pickle._Unpickler):
    """Runs one pickle with the globals of `_GLOBALS`; `storages` collects what its tensors refer to.

    The Python form of `pickle.Unpickler`, because only its instructions can be replaced.
    """

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            asked = printable(f"{module}.{name}")
            raise CheckpointError(f"refused: its pickle asks for {asked}, which is not allowed") from None

    def persistent_load(self, pid: object) -> _Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise CheckpointError("a reference that is not a storage")
        _, kind, key, _, numel = pid[:5]
        if type(kind) is not _StorageType or type(key) is not str or not _is_count(numel):
            raise CheckpointError("a storage without a known type, name and size")
        if len(pid) == 6 and pid[5] is not None:
            raise CheckpointError("storages that are views of others are not supported")
        storage = _Storage(key, kind.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"storage {printable(key)} is given with two types or sizes")
        return storage

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def refuse_set(self) -> None:
        raise CheckpointError("a set, which no DiffusionAD checkpoint holds")

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.EMPTY_SET[0]: refuse_set,
        pickle.ADDITEMS[0]: refuse_set,
        pickle.FROZENSET[0]: refuse_set,
    }


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """The next pickle of `file` and its storages. Reads exactly up to the pickle's end."""
    start = file.tell()
    try:
        # A dry run over the opcodes finds the end, and refuses more of them than run in seconds, and memo slots out of
        # any order.
        for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
            if count == _MAX_INSTRUCTIONS:
                raise CheckpointError("the pickle has more instructions than any DiffusionAD checkpoint's")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and value > _MAX_PICKLE_BYTES:
                raise CheckpointError("the pickle is damaged (memo slot out of range)")
        size = file.tell() - start
        if size > _MAX_PICKLE_BYTES:
            raise CheckpointError("the pickle is larger than any DiffusionAD checkpoint's")
        file.seek(start)
        unpickler = _Unpickler(file.read(size))
        return unpickler.load(), unpickler.storages
    except CheckpointError:
        raise
    except Exception as error:  # damaged opcodes fail in every way there is
        raise CheckpointError(f"the pickle is damaged or not allowed ({reprlib.repr(str(error))})") from None


class ZipTorchFile:
    """A zip written by torch.save: `<name>/data.pkl`, and each storage as `<name>/data/<key>`, all uncompressed."""

    def __init__(self, file: BinaryIO):
        with _zip_errors():
            self._zip = zipfile.ZipFile(file)
            entries = self._zip.infolist()
        file.seek(0, io.SEEK_END)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("refused: compressed entries, which torch.save never writes")
        if sum(entry.file_size for entry in entries) > file.tell():
            raise CheckpointError("refused: its entries claim to be larger than the file")
        self._entries = {entry.filename: entry for entry in entries}
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("not a torch.save file (no data.pkl)")
        self._prefix = pickles[0].filename.removesuffix("data.pkl")
        byteorder = self._prefix + "byteorder"
        if byteorder in self._entries and self._read(byteorder, limit=16) != b"little":
            raise CheckpointError("saved on a big-endian machine, which is not supported")
        self.root, storages = _unpickle(io.BytesIO(self._read(pickles[0].filename, limit=_MAX_PICKLE_BYTES)))
        for storage in storages.values():
            entry = self._entries.get(self._name(storage))
            if entry is None:
                raise CheckpointError(f"storage {printable(storage.key)} is missing")
            if entry.file_size != storage.numel * storage.dtype.itemsize:
                raise CheckpointError(
                    f"storage {printable(storage.key)} holds {entry.file_size} bytes, "
                    f"not {storage.numel} of {storage.dtype}"
                )

    def tensor(self, record: TensorRecord) -> torch.Tensor:
        """The tensor of `record`: its own contiguous copy, in the type it was saved in."""
        storage = record.storage
        return _view(record, self._read(self._name(storage), limit=storage.numel * storage.dtype.itemsize))

    def _name(self, storage: _Storage) -> str:
        return f"{self._prefix}data/{storage.key}"

    def _read(self, name: str, limit: int) -> bytes:
        if self._entries[name].file_size > limit:
            raise CheckpointError(f"refused: {printable(name)} is larger than any DiffusionAD checkpoint's")
        with _zip_errors():
            return self._zip.read(name)


@contextmanager
def _zip_errors() -> Iterator[None]:
    """Turns what zipfile raises on damaged archives into `CheckpointError`."""
    try:
        yield
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, struct.error, OverflowError) as error:
        raise CheckpointError(f"damaged or truncated archive ({reprlib.repr(str(error))})") from None


class LegacyTorchFile:
    """A torch.save stream from before torch 1.6: five pickles, then each storage as its element count and bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        if _unpickle(file)[0] != _LEGACY_MAGIC:
            raise CheckpointError("not a torch.save file")
        if _unpickle(file)[0] != _LEGACY_PROTOCOL:
            raise CheckpointError("an unknown version of the old torch.save format")
        system = _unpickle(file)[0]
        if not isinstance(system, dict) or dict.get(system, "little_endian") is not True:
            raise CheckpointError("saved on a big-endian machine, which is not supported")
        self.root, storages = _unpickle(file)
        keys = _unpickle(file)[0]
        if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(storages):
            raise CheckpointError("the list of storages does not match the tensors")
        self._positions: dict[str, int] = {}
        start = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(start)
        for key in keys:
            header = file.read(8)
            if len(header) != 8:
                raise CheckpointError(f"truncated: storage {printable(key)} is missing")
            storage = storages[key]
            if struct.unpack("<q", header)[0] != storage.numel:
                raise CheckpointError(f"storage {printable(key)} does not hold {storage.numel} elements")
            self._positions[key] = file.tell()
            if file.seek(storage.numel * storage.dtype.itemsize, io.SEEK_CUR) > end:
                raise CheckpointError(f"truncated: storage {printable(key)} is incomplete")

    def tensor(self, record: TensorRecord) -> torch.Tensor:
        """The tensor of `record`: its own contiguous copy, in the type it was saved in."""
        self._file.seek(self._positions[record.storage.key])
        return _view(record, self._file.read(record.storage.numel * record.storage.dtype.itemsize))


def _view(record: TensorRecord, data: bytes) -> torch.Tensor:
    values = torch.frombuffer(bytearray(data), dtype=record.storage.dtype)
    return values.as_strided(record.shape, record.stride, record.offset).clone(memory_format=torch.contiguous_format)


def open_torch_file(file: BinaryIO) -> ZipTorchFile | LegacyTorchFile:
    """Reads the pickle of a torch.save file; `.root` is its content, with a `TensorRecord` for each tensor.

    Dictionaries in it may be `OrderedDict` with attributes that the pickle set, so use `dict.items(x)`, not
    `x.items()`. `file` stays open and belongs to the result.
    """
    magic = file.read(4)
    file.seek(0)
    if magic == b"PK\x03\x04":
        return ZipTorchFile(file)
    if magic[:1] == b"\x80":
        return LegacyTorchFile(file)
    raise CheckpointError("not a torch.save file")
