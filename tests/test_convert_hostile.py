"""Damaged and hostile files in the place of public DiffusionAD weights: refused, and nothing in them is run."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch

from dfengine.checkpoint import load_checkpoint
from dfengine.convert import convert
from dfengine.errors import CheckpointError, ConfigError, DfengineError, UsageError
from tests.public_files import public_args, public_content, save, tiny_model

# Hostile pickles


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(tmp_path, data, storages=None, prefix="archive", compression=zipfile.ZIP_STORED):
    path = tmp_path / "hostile.pt"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", data)
        for key, value in (storages or {}).items():
            archive.writestr(f"{prefix}/data/{key}", value)
    return path


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        convert(path, path.parent / "out.safetensors")
    assert not (path.parent / "out.safetensors").exists()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda target: Calls(os.system, f"touch {target}"), r"(posix|nt)\.system"),
        (lambda target: Calls(eval, f"open({str(target)!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (lambda target: Calls(open, str(target), "w"), r"(io|_io|builtins|__builtin__)\.open"),
        (lambda target: Calls(functools.partial, touch, str(target)), r"functools\.partial|_hostile\.touch"),
        (lambda target: Calls(collections.defaultdict, touch), r"test_convert_hostile\.touch"),
        (lambda target: Calls(torch.load, str(target)), r"torch\.serialization\.load"),
        (lambda target: Calls(bytearray, 10**12), r"(builtins|__builtin__)\.bytearray"),
    ],
)
def test_calls_are_refused_by_name_and_not_made(tmp_path, protocol, call, name):
    target = tmp_path / "made"
    data = pickle.dumps({"args": call(target)}, protocol=protocol)
    refused(zipped(tmp_path, data), rf"its pickle asks for .*{name}")
    assert not target.exists()


@pytest.mark.parametrize("zip_file", [True, False])
def test_torch_save_of_a_call_is_refused(tmp_path, zip_file):
    target = tmp_path / "made"
    content = {**public_content(), "args": Calls(os.system, f"touch {target}")}
    path = save(tmp_path / "hostile.pt", content, _use_new_zipfile_serialization=zip_file)
    refused(path, r"\.system")
    assert not target.exists()


def test_refused_modules_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    refused(zipped(tmp_path, b"\x80\x02cevil_module\nrun\n."), r"evil_module\.run")
    refused(zipped(tmp_path, b"\x80\x02cevil_module.nested\nrun.it\n."), r"evil_module\.nested\.run\.it")
    # INST, an opcode from the first protocol, calls without REDUCE.
    refused(zipped(tmp_path, b"(S'x'\nievil_module\nrun\n."), r"evil_module\.run")
    assert not (tmp_path / "made").exists()


def test_dotted_names_do_not_reach_attributes(tmp_path):
    stack_global = b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.__class__.mro.x\x93."
    refused(zipped(tmp_path, stack_global), r"collections\.OrderedDict\.__class__")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x80\x02c__builtin__\nstr\nK\x05\x85R.", "not callable"),
        (b"\x80\x02ccollections\ndefaultdict\nccollections\nOrderedDict\n\x85R.", "factory"),
        (b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.", "damaged or not allowed"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01K\x00))t\x85R.", "damaged or not allowed|storage"),
        (b"\x80\x02K\x01r\xff\xff\xff\xff.", "memo slot"),
        (b"\x80\x02K\x01p4000000000\n.", "damaged|memo slot"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02PX\n.", "damaged|reference"),
        (b"\x80\x02K\x01Q.", "reference that is not a storage"),
        (b"\x80\x02\x82\x01.", "damaged"),
        (b"\x80\x02" + b"(" * 10 + b"l" * 10 + b".", "not a dictionary"),
    ],
)
def test_odd_pickles_are_refused(tmp_path, data, match):
    refused(zipped(tmp_path, data), match)


PROTO, ODICT = b"\x80\x02", b"ccollections\nOrderedDict\n"
DEEP = b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...: hashing it overflows the stack
SHARED = b")" + b"2\x86" * 60  # DUP TUPLE2: one tuple twice in the next; hashing it takes 2**60 steps
MEMOISED = b")" + b"q\x00h\x00\x86" * 60  # the same by BINPUT and BINGET
REFUSED_KEY = "key that is neither text nor a whole number"


UNHASHABLE = [
    (PROTO + b"})" + b"\x85" * 5_000_000 + b"Ns.", "more instructions"),
    *((PROTO + b"}" + key + b"Ns.", REFUSED_KEY) for key in (DEEP, SHARED, MEMOISED)),
    (PROTO + b"}(" + DEEP + b"Nu.", REFUSED_KEY),
    (PROTO + b"}(K\x01N" + SHARED + b"Nu.", REFUSED_KEY),
    (b"(" + SHARED + b"Nd.", REFUSED_KEY),
    (PROTO + ODICT + b"]" + DEEP + b"N\x86a\x85R.", REFUSED_KEY),
    (PROTO + ODICT + b"]" + SHARED + b"N\x86a\x85R.", REFUSED_KEY),
    (PROTO + ODICT + b"}" + SHARED + b"Ns\x85R.", REFUSED_KEY),
    (PROTO + ODICT + SHARED + b"\x85R.", REFUSED_KEY),
    (PROTO + ODICT + b"K\x05\x85R.", "something other than pairs"),
    (b"\x80\x04\x8f(" + DEEP + b"\x90.", "a set"),
    (b"\x80\x04(" + SHARED + b"\x91.", "a set"),
    (PROTO + b"}G" + bytes(8) + b"Ns.", REFUSED_KEY),
    (PROTO + DEEP + b".", "not a dictionary"),
    (PROTO + SHARED + b"Q.", "not a storage"),
    (PROTO + b"}X\x01\x00\x00\x00a" + SHARED + b"s.", "no unet_model_state_dict"),
]
CONVERT_EACH = """
import sys
from dfengine.convert import convert
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.errors import CheckpointError
for source in sys.argv[2:]:
    try:
        convert(source, sys.argv[1])
    except CheckpointError as error:
        print(error, flush=True)
"""


def test_structures_that_cannot_be_hashed_in_time_are_refused(tmp_path):
    """In a process of its own: what is tested for is a crash or an endless loop."""
    paths = []
    for number, (data, _) in enumerate(UNHASHABLE):
        paths.append(str(zipped(tmp_path, data).rename(tmp_path / f"{number}.pt")))
    command = [sys.executable, "-c", CONVERT_EACH, str(tmp_path / "out.safetensors"), *paths]
    done = subprocess.run(command, text=True, capture_output=True, timeout=90)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    for path, (_, match), line in zip(paths, UNHASHABLE, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path}: ") and match in line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_nested_dictionaries_of_every_kind_are_read(tmp_path, protocol):
    args = public_args(nested={"a": collections.OrderedDict(b=collections.defaultdict(int, {3: (1, (2, ()))}))})
    path = save(tmp_path / "a.pt", public_content(args), pickle_protocol=protocol)
    convert(path, tmp_path / "a.safetensors")
    state = load_checkpoint(tmp_path / "a.safetensors").state
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_model().state_dict().items())


def test_the_stand_ins_cannot_be_changed(tmp_path):
    """BUILD sets attributes on whatever is on the stack: nothing of it may outlast the file."""
    source = save(tmp_path / "good.pt", public_content())
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\ndefaultdict\n", b"c__builtin__\nstr\n"):
        for attribute in (b"__call__", b"__defaults__", b"__class__"):
            state = b"N}X" + struct.pack("<I", len(attribute)) + attribute + b"K\x01s\x86b"
            refused(zipped(tmp_path, b"\x80\x02" + name + state + b"."), "damaged or not allowed")
    convert(source, tmp_path / "out.safetensors")


def test_attributes_on_ordered_dicts_are_ignored(tmp_path):
    """torch leaves `_metadata` on state dicts; a pickle could as well leave an `items` that hides the method."""
    content = public_content()
    content["args"] = collections.OrderedDict(content["args"])
    content["args"].get_ = "shadowed"
    path = save(tmp_path / "a.pt", content, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for hidden in (b"get_", b"_metadata"):
        assert hidden in data
    metadata = b"X\x09\x00\x00\x00_metadata"
    data = data.replace(b"X\x04\x00\x00\x00get_", b"X\x03\x00\x00\x00get")
    data = data.replace(metadata, b"X\x05\x00\x00\x00items")
    assert b"\x00\x00get" in data and data.count(b"\x00items") == 1  # the second dict refers to it
    path.write_bytes(data)
    convert(path, tmp_path / "out.safetensors")


# Storages that lie


class Record:
    """Pickles as a tensor over storage "0", with whatever geometry it is given."""

    def __init__(self, shape, stride, offset=0, numel=4, kind=torch.FloatStorage):
        self.geometry, self.numel, self.kind = (offset, shape, stride), numel, kind


def tensor_pickle(record):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", record.kind, "0", "cpu", record.numel) if value is record else None

        def reducer_override(self, value):
            if isinstance(value, Wrapped):
                return torch._utils._rebuild_tensor_v2, (record, *record.geometry, False, collections.OrderedDict())
            return NotImplemented

    class Wrapped:
        pass

    buffer = io.BytesIO()
    state = {"down.0.0.weight": Wrapped()}
    Pickler(buffer, protocol=2).dump({"unet_model_state_dict": state, "seg_model_state_dict": {}, "args": {}})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("record", "stored", "match"),
    [
        (Record((4,), (1,)), 16, "do not give .img_size."),  # well formed: only the model is wrong
        (Record((5,), (1,)), 16, "reaches past its storage of 4"),
        (Record((4,), (1,), offset=1), 16, "reaches past"),
        (Record((2, 2), (3, 1)), 16, "reaches past"),
        (Record((1000, 1000, 1000), (0, 0, 0)), 16, "reaches past"),
        (Record((4,), (-1,), offset=3), 16, "out of range"),
        (Record((4,), (1,), offset=-1), 16, "out of range"),
        (Record((0, 2**40), (1, 1)), 16, "out of range"),
        (Record((4,), (1, 1)), 16, "do not fit"),
        (Record((4.0,), (1,)), 16, "out of range"),
        (Record((4,), (1,)), 12, "holds 12 bytes, not 4 of torch.float32"),
        (Record((4,), (1,)), 20, "holds 20 bytes"),
        (Record((4,), (1,), kind=torch.DoubleStorage), 16, "not 4 of torch.float64"),
        (Record((4,), (1,), numel=-4), 16, "storage without"),
        (Record((4,), (1,), numel=2**47), 16, "holds 16 bytes"),
        (Record((4,), (1,), numel=2**60), 16, "storage without"),
        (Record((4,), (1,), numel=10**5000), 16, "storage without"),
        (Record((4,), (1,)), None, "storage 0 is missing"),
        (Record((4,), (1,), kind=os.system), 16, r"system"),
        (Record((4,), (1,), kind=str), 16, "storage without a known type"),
    ],
)
def test_storages_that_lie_are_refused(tmp_path, record, stored, match):
    storages = {} if stored is None else {"0": b"\0" * stored}
    refused(zipped(tmp_path, tensor_pickle(record), storages), match)


# Damaged containers


def test_compressed_entries_are_refused(tmp_path):
    data = tensor_pickle(Record((4,), (1,), numel=10**7))
    path = zipped(tmp_path, data, {"0": bytes(4 * 10**7)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**6
    refused(path, "compressed")


def test_entries_larger_than_the_file_are_refused(tmp_path):
    path = zipped(tmp_path, tensor_pickle(Record((4,), (1,), numel=2**29)), {"0": bytes(16)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    assert struct.unpack_from("<II", data, entry + 20) == (16, 16)
    struct.pack_into("<II", data, entry + 20, 2**31 - 1, 2**31 - 1)
    path.write_bytes(data)
    refused(path, "larger than the file")


@pytest.mark.parametrize("zip_file", [True, False])
def test_every_truncation_is_refused(tmp_path, zip_file):
    whole = save(tmp_path / "whole.pt", public_content(), _use_new_zipfile_serialization=zip_file).read_bytes()
    path = tmp_path / "cut.pt"
    for share in (0, 1e-5, 1e-4, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "truncated|damaged|not a torch.save file")
    path.write_bytes(whole[:-1])
    refused(path, "truncated|damaged")


@pytest.mark.parametrize("zip_file", [True, False])
def test_flipped_bytes_never_escape(tmp_path, zip_file):
    """Any damage either is refused in one line or, in a stream (no checksums), changes only values."""
    whole = save(tmp_path / "whole.pt", public_content(), _use_new_zipfile_serialization=zip_file).read_bytes()
    generator = torch.Generator().manual_seed(2)
    path, out = tmp_path / "flipped.pt", tmp_path / "out.safetensors"
    refusals = 0
    # The pickle lies at the start; the directory of a zip at its end.
    for start, end, flips in ((0, 3000, 12), (len(whole) - 3000, len(whole), 4)):
        for position in torch.randint(start, end, (flips,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[position] ^= 0xFF
            path.write_bytes(damaged)
            out.unlink(missing_ok=True)
            try:
                convert(path, out)
            except CheckpointError:
                refusals += 1
    assert refusals >= 6


def test_other_files(tmp_path):
    refused(tmp_path / "absent.pt", "no such file")
    refused(tmp_path, "is a")
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\n", pickle.dumps({"a": 1}), pickle.dumps(5)):
        (tmp_path / "other.pt").write_bytes(content)
        refused(tmp_path / "other.pt", "not a torch.save file|damaged")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.pt", "no data.pkl")


def test_usage(tmp_path):
    source = save(tmp_path / "a.pt", public_content())
    before = source.read_bytes()
    with pytest.raises(UsageError, match="must not replace its source"):
        convert(source, source)
    with pytest.raises(ConfigError, match="unknown preset"):
        convert(source, tmp_path / "out.safetensors", preset="nonsense")
    (tmp_path / "file").write_text("")
    with pytest.raises(DfengineError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out.safetensors")
    assert source.read_bytes() == before
