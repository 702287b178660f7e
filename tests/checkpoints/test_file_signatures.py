"""A file's content decides its format; each unsupported kind has a message with a remedy."""

import json

import numpy as np
import pytest
from random_checkpoints import CONFIG, differing, random_params, random_state

from rwkv7_jax.checkpoints import has_merged_state, verify
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.checkpoints.pth import read_pth, write_pth
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import read_sidecar, sidecar
from rwkv7_jax.checkpoints.tensor_files import read_safetensors, read_tensors
from rwkv7_jax.checkpoints.unused_value_residual import without_unused_value_residual
from rwkv7_jax.cli.commands import main

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1527\n"
)

OTHER_FILES = {
    "nothing": (b"", "is empty"),
    "lfs": (POINTER, "is a Git LFS pointer.*fetch the file itself"),
    "page": (
        b"<!DOCTYPE html>\n<html lang=en>",
        "is a web page: download the file itself",
    ),
    "page with space": (b"\n\n  <html><head>", "is a web page"),
    "page with comment": (b"<!-- x --><html>", "is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is a web page"),
    "error of a server": (
        b'{"error":"Repository not found"}',
        "is a text file that begins with",
    ),
    "not found": (
        b"Entry not found",
        "is a text file that begins with 'Entry not found'",
    ),
    "utf-8": ("\u4f60\u597d".encode() * 400, "is a text file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "is compressed with gzip: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(30), "is compressed with zstd"),
    "xz": (b"\xfd7zXZ\0" + bytes(30), "is compressed with xz"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a 7z archive"),
    "rwkv.cpp": (b"fmgg\x63\0\0\0" + bytes(30), "is a file of rwkv.cpp of version 99"),
    "model of Ai00": (
        b"\xa5gcontext\xa0" + bytes(30),
        "is a prefab of Ai00: use the .st",
    ),
    "state of Ai00": (b"\xa4dnamecone" + bytes(30), "is a prefab of Ai00"),
    "pdf": (b"%PDF-1.7\n", "is a PDF"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(30), "is a picture"),
    "numpy": (b"\x93NUMPY\x01\0" + bytes(30), "is an array of NumPy"),
    "zeros": (bytes(5000), "begins with zeros only"),
    "old torch": (
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9),
        "before version 1.6",
    ),
}


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.st"])
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_kinds_of_files_are_named_with_a_remedy(tmp_path, name, kind):
    data, sentence = OTHER_FILES[kind]
    path = tmp_path / name
    path.write_bytes(data)
    for read in (load_model, load_state, read_tensors, verify):
        with pytest.raises(ValueError, match=sentence) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{read.__name__}: `{path}` ")
        assert message.count(": `") == 1 and "\n" not in message


@pytest.mark.parametrize("name", ["a.bin", "a", "a.ckpt", "a.json"])
def test_an_unknown_suffix_is_identified_by_content(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        load_model(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x01\x02\x03")
    with pytest.raises(ValueError, match="is not a checkpoint: it begins neither"):
        load_model(tmp_path / name)


def test_content_overrules_the_suffix(tmp_path):
    save_model(tmp_path / "m.pth", random_params(), CONFIG)
    save_model(tmp_path / "m.safetensors", random_params(), CONFIG)
    (tmp_path / "m.pth").rename(tmp_path / "z.safetensors")
    (tmp_path / "m.safetensors").rename(tmp_path / "s.pth")
    for name in ("z.safetensors", "s.pth"):
        loaded = without_unused_value_residual(load_model(tmp_path / name)[0])
        assert differing(loaded, random_params()) == []


def test_single_format_readers_suggest_the_right_suffix(tmp_path):
    save_model(tmp_path / "m.pth", random_params(), CONFIG)
    save_model(tmp_path / "m.safetensors", random_params(), CONFIG)
    with pytest.raises(ValueError, match=r"zip archive.*rename it to \.pth"):
        read_safetensors(tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"holds safetensors: rename it to \.safetensors"
    ):
        read_pth(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.st"])
def test_a_truncated_download_reports_where_it_ends(tmp_path, name):
    path = tmp_path / name
    save_model(path, random_params(), CONFIG)
    data = path.read_bytes()
    for share in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        sentence = (
            "is an incomplete download: the file ends inside .*; download it again"
        )
        with pytest.raises(ValueError, match=sentence):
            load_model(path)


@pytest.mark.parametrize(
    ("name", "write", "load"),
    [
        ("m.pth", lambda path: save_model(path, random_params(), CONFIG), load_model),
        ("s.pth", lambda path: save_state(path, random_state()), load_state),
    ],
)
def test_every_reader_names_a_damaged_pth_tensor(tmp_path, name, write, load):
    path = tmp_path / name
    write(path)
    damage(path)
    sentence = r"its tensor 'blocks\.\d[\w.]+' is damaged \(its CRC-32 differs\)"
    for read in (load, verify):
        with pytest.raises(ValueError, match=sentence) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_tensors_are_not_quantized(tmp_path):
    save_model(tmp_path / "m.pth", random_params(), CONFIG)
    damage(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="is damaged"):
        load_model(tmp_path / "m.pth", weights="int8")


def test_shared_storage_is_verified_for_each_tensor(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    path = tmp_path / "a.pth"
    numbers = torch.arange(4096.0)
    tensors = {"a": numbers[:100], "b": numbers[3000:], "none": torch.zeros(0)}
    torch.save({"state_dict": tensors}, path)
    assert len(read_tensors(path)["b"].read()) == 1096
    damage(path)
    opened = read_tensors(path)
    assert opened["none"].read().size == 0
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"its tensor '{name}' is damaged"):
            opened[name].read()


def test_a_slice_is_read_without_the_rest_of_the_tensor(tmp_path):
    write_pth(tmp_path / "a.pth", [("x", np.arange(8192.0).reshape(64, 128))])
    damage(tmp_path / "a.pth")
    part = read_tensors(tmp_path / "a.pth")["x"].part((slice(0, 2), slice(0, 3)))
    np.testing.assert_array_equal(part, [[0, 1, 2], [128, 129, 130]])


def damage(path):
    """Invert 64 bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 64):
        data[place] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.st", "orbax", "hf"])
def test_inspect_and_convert_verify_models(tmp_path, capsys, name):
    config = CONFIG
    if name == "hf":
        config = type(CONFIG)(
            **{**CONFIG.__dict__, "group_norm_eps": 32 * CONFIG.norm_eps}
        )
    format = "hf" if name == "hf" else None
    save_model(tmp_path / name, random_params(), config, format=format)
    assert main(["inspect", "--verify", str(tmp_path / name)]) == 0
    assert "agrees" in capsys.readouterr().out
    file = max(
        (f for f in [tmp_path / name, *(tmp_path / name).rglob("*")] if f.is_file()),
        key=size,
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    # What is converted would have digests that agree.
    for words in (["inspect", "--verify"], ["convert", "--dtype", "float32"]):
        target = [str(tmp_path / "out.pth")] if words[0] == "convert" else []
        assert main([words[0], str(tmp_path / name), *target, *words[1:]]) == 2
        printed = capsys.readouterr().err.splitlines()
        assert str(tmp_path / name) in printed[-1]
    assert not (tmp_path / "out.pth").exists()


def size(file) -> int:
    """Return the size of a file."""
    return file.stat().st_size


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("[]", "must hold a JSON object; got a list"),
        ("null", "must hold a JSON object; got a NoneType"),
        ("3", "must hold a JSON object; got a int"),
        ('{"axes": "head, val', "is not JSON, or is truncated"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"axes": ["head"]}', "`axes` of a state's sidecar must be a string"),
        (
            '{"base_model": {"a": 1}}',
            "`base_model` of a state's sidecar must be a string",
        ),
        ('{"previous": 3}', "must hold a table under 'previous'"),
        ("\ud83d".encode("utf-8", "surrogatepass"), "is not JSON, or is truncated"),
    ],
)
def test_a_sidecar_that_is_not_an_object_is_named(tmp_path, text, sentence):
    path = tmp_path / "s.pth"
    save_state(path, random_state())
    sidecar(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (load_state, read_sidecar):
        with pytest.raises(ValueError, match=sentence) as caught:
            read(path)
        assert str(sidecar(path)) in str(caught.value)


def write_merged(path):
    """Write a model with a state merged into it."""
    tensors = dict(official_tensors(random_params(), CONFIG))
    for layer, wkv in enumerate(np.asarray(random_state().wkv[:, 0])):
        tensors[f"blocks.{layer}.att.time_state"] = wkv
    write_pth(path, tensors.items())


@pytest.mark.filterwarnings("ignore:.*holds a tuned state as well")
@pytest.mark.parametrize("name", ["out.state.pth", "out.state.pth.json"])
def test_convert_does_not_overwrite_a_state_implicitly(
    tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    write_merged(tmp_path / "merged.pth")
    for target, state in (("out.pth", name), ("out", name)):
        (tmp_path / state).write_text("days of work")
        assert main(["convert", "merged.pth", target]) == 2
        err = capsys.readouterr().err
        assert f"convert: `{state}` must not exist" in err
        assert (tmp_path / state).read_text() == "days of work"
        assert not (tmp_path / target).exists()


def test_convert_splits_a_merged_state_from_its_model(tmp_path, capsys):
    write_merged(tmp_path / "merged.pth")
    assert has_merged_state(tmp_path / "merged.pth")
    for target, state in (
        ("out.pth", "out.state.pth"),
        ("out.st", "out.state.st"),
        ("folder", "folder.state.pth"),
    ):
        with pytest.warns(UserWarning, match="holds a tuned state as well"):
            code = main(
                ["convert", str(tmp_path / "merged.pth"), str(tmp_path / target)]
            )
        assert code == 0
        assert f"{state}: the tuned state" in capsys.readouterr().out
        assert (
            differing(load_state(tmp_path / state, config=CONFIG), random_state()) == []
        )
        assert not has_merged_state(tmp_path / target)


def test_a_state_list_of_the_rwkv_package_loads_completely(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle extra is not installed")
    state = random_state()
    state = state.replace(
        att_shift=state.att_shift + 0.5, ffn_shift=state.ffn_shift - 0.25
    )
    parts = []
    for att, wkv, ffn in zip(state.att_shift, state.wkv, state.ffn_shift, strict=True):
        parts += [torch.tensor(np.asarray(x[0])) for x in (att, wkv, ffn)]
    torch.save(parts, tmp_path / "session.pth")
    assert differing(load_state(tmp_path / "session.pth", config=CONFIG), state) == []
    torch.save(parts[:-1], tmp_path / "short.pth")
    with pytest.raises(ValueError, match="holds a list that is not a session state"):
        load_state(tmp_path / "short.pth")


def test_a_hand_edited_sidecar_is_rejected(tmp_path):
    save_state(tmp_path / "s.pth", random_state())
    card = json.loads(sidecar(tmp_path / "s.pth").read_text())
    for change in (
        {"dynamics": "decay"},
        {"kind": "fourier"},
        {"layers": 2},
        {"digest": "0"},
    ):
        sidecar(tmp_path / "s.pth").write_text(json.dumps(card | change))
        with pytest.raises(ValueError, match="does not belong to the tensors"):
            load_state(tmp_path / "s.pth")
    assert read_tensors(tmp_path / "s.pth").keys() == {
        f"blocks.{layer}.att.time_state" for layer in range(3)
    }
