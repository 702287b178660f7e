"""Malicious PyTorch zip checkpoints are rejected in one sentence, and nothing runs."""

import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
from run_programs import ROOT

from rwkv7_jax.checkpoints.pth import read_pth, write_pth


class Calls:
    """An object that pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        """Keep the call."""
        self._call = (function, arguments)

    def __reduce__(self):
        """The call."""
        return self._call


SENTINEL = "touched"


def touch(path) -> str:
    return f"open({str(path / SENTINEL)!r}, 'w').close()"


def tensor(shape, strides, offset=0, *, count=6, key="0") -> bytes:
    """Return the pickle of one float32 tensor with any shape, valid or not."""
    where = ("storage", key, "cpu", count)
    description = b"(" + item(where[0]) + b"ctorch\nFloatStorage\n"
    description += b"".join(map(item, where[1:])) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + description
        + b"".join(map(item, (offset, shape, strides, False)))
        + b"ccollections\nOrderedDict\n)RtR"
    )


def item(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def program(body: bytes) -> bytes:
    return b"\x80\x02}" + item("x") + body + b"s."


def memo_bomb() -> bytes:
    levels = b"".join(
        b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
    )
    return b"\x80\x02)" + levels


def from_type(function: bytes, arguments: bytes) -> bytes:
    """Return the pickle of a tensor with attributes, rebuilt by `function(*arguments)`."""
    start = b"ctorch._tensor\n_rebuild_from_type_v2\n("
    return start + function + b"ctorch\nTensor\n" + arguments + b"}tR"


def sets_of_one_list() -> bytes:
    """Return calls that would copy a long list thousands of times, then a forbidden name."""
    numbers = b"]q\x00(" + b"K\x01" * 100_000 + b"e"
    copies = b"c__builtin__\nset\nq\x01" + b"h\x01h\x00\x85R" * 30_000
    return b"\x80\x02" + numbers + copies + b"cos\nsystem\n."


def counters_of_one_dict() -> bytes:
    """Return the same program with a dict."""
    items = b"}q\x00(" + b"".join(
        b"M" + struct.pack("<H", key) + b"N" for key in range(50_000)
    )
    copies = b"ccollections\nCounter\nq\x01" + b"h\x01h\x00\x85R" * 30_000
    return b"\x80\x02" + items + b"u" + copies + b"cos\nsystem\n."


def devices_of_one_tuple() -> bytes:
    """Return calls that would scan a long tuple thousands of times."""
    numbers = b"(" + b"K\x01" * 50_000 + b"tq\x00"
    calls = b"ctorch\ndevice\nq\x01" + b"h\x01h\x00R" * 5_000
    return b"\x80\x02" + numbers + calls + b"cos\nsystem\n."


# Each builds a pickle in which nothing may run.
MALICIOUS = {
    "os.system": lambda p: pickle.dumps(
        {"x": Calls(os.system, f"touch {p / SENTINEL}")}, 2
    ),
    "eval": lambda p: pickle.dumps({"x": Calls(eval, touch(p))}, 2),
    "exec, protocol 4": lambda p: pickle.dumps({"x": Calls(exec, touch(p))}, 4),
    "nested reduce": lambda p: pickle.dumps(Calls(map, Calls(eval, touch(p)), [1]), 2),
    "getattr chain": lambda p: pickle.dumps(
        Calls(getattr, Calls(__import__, "os"), "system"), 2
    ),
    "subprocess": lambda p: pickle.dumps(
        Calls(subprocess.run, ["touch", str(p / SENTINEL)]), 2
    ),
    "protocol 0": lambda p: pickle.dumps(Calls(eval, touch(p)), 0),
    "instance opcode": lambda p: (
        b"(S'" + touch(p).encode().replace(b"'", b'"') + b"'\nieval\ne\n."
    ),
    "torch's own opener": lambda p: b"\x80\x02ctorch.hub\nload\n)R.",
    "a name with dots": lambda p: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n."
    ),
    "a storage that is called": lambda p: program(b"ctorch\nFloatStorage\n(K\x05tR"),
    "attributes of a tensor": lambda p: program(tensor((2, 3), (3, 1)) + b"}b"),
    "a name made of memo": lambda p: memo_bomb() + b"h\x3b\x93.",
    "deep nesting": lambda p: b"\x80\x02)" + b"\x85" * 200_000 + b"q\x00h\x00\x93.",
    "deep keys": lambda p: b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "a million dicts": lambda p: b"\x80\x02" + b"}" * 1_000_000 + b".",
    "huge long": lambda p: (
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01" * 99 + b"."
    ),
    "huge decimal": lambda p: b"L" + b"9" * 4_000_000 + b"L\n.",
    "huge string": lambda p: b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "stack underflow": lambda p: b"\x80\x02R.",
    "unknown opcode": lambda p: b"\x80\x02\xff.",
    "no end": lambda p: b"\x80\x02}",
    "an extension": lambda p: b"\x80\x02\x82\x01.",
    "too large a shape": lambda p: program(tensor((1 << 40, 1 << 40), (1, 1))),
    "a shape of huge numbers": lambda p: program(tensor((1 << 2000,), (1,))),
    "negative strides": lambda p: program(tensor((2, 3), (-3, 1), 5)),
    "a negative offset": lambda p: program(tensor((2,), (1,), -1)),
    "an offset after the end": lambda p: program(tensor((2,), (1,), 5)),
    "one number as many": lambda p: program(tensor((1 << 30,), (0,))),
    "a thousand axes": lambda p: program(tensor((1,) * 1000, (1,) * 1000)),
    "a storage of a lying size": lambda p: program(
        tensor((2, 3), (3, 1), count=1 << 50)
    ),
    "a storage that is missing": lambda p: program(tensor((2,), (1,), key="../0")),
    "a dtype that is called": lambda p: program(b"ctorch\nbfloat16\n)R"),
    "a name behind a dtype": lambda p: b"\x80\x02ctorch\nbfloat16.__class__\n.",
    "attributes of a device": lambda p: program(
        b"ctorch\ndevice\n" + item("cpu") + b"\x85R}b"
    ),
    "a device of a list": lambda p: program(b"ctorch\ndevice\n]\x85R"),
    "a decoder": lambda p: program(b"c_codecs\ndecode\n" + item("a") + b"\x85R"),
    "a class of a tensor that is called": lambda p: program(b"ctorch\nTensor\n)R"),
    "a tensor that eval rebuilds": lambda p: program(
        from_type(b"cbuiltins\neval\n", item(touch(p)) + b"\x85")
    ),
    "a tensor that a device rebuilds": lambda p: program(
        from_type(b"ctorch\ndevice\n", item("cpu") + b"\x85")
    ),
    "a tensor that is rebuilt within itself": lambda p: program(
        from_type(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"(NNNNt")
    ),
    "a tensor that a text rebuilds": lambda p: program(from_type(item("eval"), b")")),
    "a list that is copied without end": lambda p: sets_of_one_list(),
    "a dict that is copied without end": lambda p: counters_of_one_dict(),
    "a tuple that is looked through without end": lambda p: devices_of_one_tuple(),
    "a counter of a number": lambda p: program(b"ccollections\nCounter\nK\x05\x85R"),
    "a key that is a tuple": lambda p: b"\x80\x02}K\x01\x85K\x01s.",
    "huge bytes": lambda p: b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"x.",
    "a shape that is not a tuple": lambda p: program(tensor("ab", (1, 1))),
}


def archive(path: Path, body: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", body)
        file.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
        for name, data in entries.items():
            file.writestr(name, data)
    return path


def refused(path: Path) -> str:
    """Return the error message for `path`."""
    with pytest.raises(ValueError) as caught:
        read_pth(path)
    text = str(caught.value)
    assert text.startswith("read_pth: `") and text.endswith(".")
    assert text.isprintable() and len(text) < 200 + len(str(path))
    return text


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_pickle_is_rejected_and_nothing_runs(unchecked, tmp_path, name):
    refused(archive(tmp_path / "a.pth", MALICIOUS[name](tmp_path)))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_tensor_helper_also_makes_valid_tensors(tmp_path):
    path = archive(tmp_path / "a.pth", program(tensor((2, 3), (3, 1))))
    np.testing.assert_array_equal(read_pth(path)["x"], np.arange(6.0).reshape(2, 3))


def test_the_error_names_the_forbidden_global(tmp_path):
    body = pickle.dumps(Calls(os.system, "true"), 2)
    assert "system`, which is not allowed" in refused(archive(tmp_path / "a.pth", body))


def test_every_rejected_global_comes_with_a_remedy(tmp_path):
    for name in (b"lightning", b"x" * 500):
        body = b"\x80\x02c" + name + b"\nThing\n."
        sentence = refused(archive(tmp_path / "a.pth", body))
        assert sentence.endswith("load it with PyTorch and save only its state_dict.")


def test_a_call_of_bytes_is_never_executed(tmp_path):
    body = program(b"cbuiltins\nbytes\n" + item(1 << 60) + b"\x85R")
    found = read_pth(archive(tmp_path / "a.pth", body))
    assert tuple(found["x"]) == ("builtins", "bytes")


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    body = b"\x80\x02cevil\x1b[2J\nname\n."
    assert "evil?[2J.name" in refused(archive(tmp_path / "a.pth", body))


def test_excessively_overlapping_tensors_are_rejected(tmp_path):
    count = 4 << 20
    one = tensor((count,), (1,), count=count, key="big")
    body = b"\x80\x02}(" + b"".join(item(f"x{i}") + one for i in range(9)) + b"u."
    path = archive(tmp_path / "a.pth", body, **{"archive/data/big": bytes(4 * count)})
    assert "overlap so much" in refused(path)


def test_compressed_entries_are_rejected_before_decompression(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", program(tensor((2, 3), (3, 1))))
        file.writestr("archive/data/0", bytes(50 << 20))
    assert "compressed" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "archive/../../outside",
        "/etc/passwd",
        "other/data/0",
        "a\\b",
        "alone",
    ],
)
def test_entries_outside_the_archive_root_are_rejected(tmp_path, name):
    body = program(tensor((2, 3), (3, 1)))
    assert "its entry" in refused(archive(tmp_path / "a.pth", body, **{name: b"x"}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_entry_is_rejected(tmp_path):
    body = program(tensor((2, 3), (3, 1)))
    assert "twice" in refused(
        archive(tmp_path / "a.pth", body, **{"archive/data.pkl": body})
    )


def test_overlapping_entries_are_rejected(tmp_path):
    path = archive(
        tmp_path / "a.pth", program(tensor((2, 3), (3, 1))), **{"archive/data/1": b"x"}
    )
    data = bytearray(path.read_bytes())
    central = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[central[2] + 42 : central[2] + 46] = data[central[1] + 42 : central[1] + 46]
    path.write_bytes(data)
    assert "refused" in refused(path)


def test_an_entry_beyond_the_end_of_the_file_is_rejected(tmp_path):
    path = archive(tmp_path / "a.pth", program(tensor((2, 3), (3, 1))))
    data = bytearray(path.read_bytes())
    central = data.rfind(b"PK\x01\x02")
    data[central + 20 : central + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    path.write_bytes(data)
    assert "extends past the end of the file" in refused(path)


def test_too_many_entries_are_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as file:
        for i in range(30_000):
            file.writestr(f"archive/data/{i:030}", b"")
    assert "list of entries" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty (0 bytes)"),
        (b"PK", "is an incomplete download"),
        (b"\x80\x02}.", "is not a zip file"),
        (b"<html></html>", "is a web page"),
        (bytes(1000), "begins with zeros only"),
    ],
)
def test_a_file_that_is_not_a_zip_is_rejected(tmp_path, data, sentence):
    (tmp_path / "a.pth").write_bytes(data)
    assert sentence in refused(tmp_path / "a.pth")


def test_a_file_truncated_anywhere_is_rejected(tmp_path):
    write_pth(tmp_path / "a.pth", [("x", np.arange(9.0)), ("y", np.arange(99.0))])
    complete = (tmp_path / "a.pth").read_bytes()
    for size in range(0, len(complete) - 1, 37):
        (tmp_path / "b.pth").write_bytes(complete[:size])
        refused(tmp_path / "b.pth")


def test_a_pickle_with_a_changed_byte_loads_or_is_rejected(tmp_path):
    good = program(tensor((2, 3), (3, 1)))
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            read_pth(archive(tmp_path / "a.pth", bytes(bad)))
        except ValueError as error:
            assert str(error).startswith("read_pth: `")


def test_a_missing_file_is_rejected(tmp_path):
    assert "is not a file" in refused(tmp_path / "none.pth")


MEASURE = """
    import sys, time, types
    # Stand-ins: the packages' own __init__ would import JAX.
    for name in ("rwkv7_jax", "rwkv7_jax.checkpoints"):
        package = types.ModuleType(name)
        package.__path__ = [name.replace(".", "/")]
        sys.modules[name] = package
    from rwkv7_jax.checkpoints.pth import read_pth
    import json

    def peak():
        # Not `ru_maxrss`, which begins with what the parent had.
        status = open("/proc/self/status")
        return int(next(row for row in status if row.startswith("VmHWM")).split()[1])

    imported = peak()
    rows = {}
    for path in sys.argv[1:]:
        begun = time.process_time()
        try:
            read_pth(path)
            rows[path] = "accepted"
        except ValueError:
            rows[path] = time.process_time() - begun
    print(json.dumps([rows, peak() - imported]))
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is read from /proc"
)
def test_rejection_is_fast_and_needs_under_30_mb(tmp_path):
    """Measure in a separate process whose peak memory comes from the reader alone."""
    paths = []
    for number, build in enumerate(MALICIOUS.values()):
        paths.append(str(archive(tmp_path / f"{number}.pth", build(tmp_path))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows, added = json.loads(done.stdout)
    seconds = dict(zip(MALICIOUS, rows.values(), strict=True))
    assert not [
        name for name, row in seconds.items() if row == "accepted" or row > 1
    ], seconds
    assert added < 30_000, f"{added} kB on top of the imports"
    assert not (tmp_path / SENTINEL).exists()
