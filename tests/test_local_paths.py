"""Paths as people type them: addresses, names on hubs, lists, and spellings of one file."""

import errno
import io
import os
import pathlib

import pytest
import tiny_observers
from random_checkpoints import CONFIG, random_params, random_state

from rwkv7_jax.checkpoints.integrity.verification import verify
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.data.loading import token_stream
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.token_cache import open_cache, write_cache
from rwkv7_jax.local_paths import (
    check_target,
    existing_path,
    is_remote,
    is_same,
    local_path,
    name_in_errors,
    refuse_hub_name,
    require_unicode,
    split_list,
    split_paths,
)
from rwkv7_jax.observer.files import load_observer, observer_info, save_observer
from rwkv7_jax.runs.resume.run_identity import content_digests
from rwkv7_jax.text.tokenizer import Tokenizer

# An address, and what the advice must name.
ADDRESSES = [
    ("hf://a/b", "hf download a/b"),
    ("hf:/a/b", "hf download a/b"),
    ("hf:a/b", "hf download a/b"),
    ("HF:a/b", "hf download a/b"),
    (" hf:a/b", "hf download a/b"),
    ("hf:a/b/m.pth", "hf download a/b m.pth"),
    ("https://huggingface.co/a/b", "hf download a/b"),
    ("https://huggingface.co/a/b/resolve/main/m.pth", "hf download a/b m.pth"),
    ("https://hf.co/a/b/blob/main/m.pth", "hf download a/b m.pth"),
    ("https://hf-mirror.com/a/b", "hf download a/b"),
    ("huggingface.co/a/b", "hf download a/b"),
    ("hf.co/a/b", "hf download a/b"),
    ("HuggingFace.co/a/b", "hf download a/b"),
    ("gs://b/x", "gcloud storage cp -r gs://b/x"),
    ("gs:/b/x", "gcloud storage cp -r gs://b/x"),
    ("gs:b/x", "gcloud storage cp -r gs://b/x"),
    ("GS://b/x", "gcloud storage cp -r gs://b/x"),
    ("gcs://b/x", "gcloud storage cp -r gs://b/x"),
    ("s3://b/x", "aws s3 cp --recursive s3://b/x"),
    ("s3:b/x", "aws s3 cp --recursive s3://b/x"),
    ("http://h/x", "curl -LO http://h/x"),
    ("https:h/x", "curl -LO https://h/x"),
    ("https:\\\\h\\x", "curl -LO https://h/x"),
    ("ftp://h/x", "curl -LO ftp://h/x"),
    ("file:///x", "curl -LO file://x"),
    ("az://c/x", "az://c/x"),
    ("abfss://c@h/x", "abfss://c@h/x"),
    ("oss://b/x", "oss://b/x"),
    ("hdfs:b/x", "hdfs://b/x"),
    ("ssh://h/x", "ssh://h/x"),
    ("git@github.com:a/b.git", "https://github.com/a/b.git"),
    ("github.com/a/b", "https://github.com/a/b"),
    ("modelscope.cn/models/a", "https://modelscope.cn/models/a"),
    ("www.example.org/x", "https://www.example.org/x"),
    ("unknown+scheme://x", "unknown+scheme://x"),
]

FILES = [
    "C:/x.pth",
    "C:x.pth",
    "rank:1.pth",
    "12:30.txt",
    "task:copy",
    "./hf:a",
    "hf",
    "https",
    "www.pth",
    "a.com/x",
    "../gs/x",
    "a b.txt",
    "x:y/z",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every path is looked up in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("address", "command"), ADDRESSES)
def test_an_address_is_rejected_with_its_download_command(address, command):
    for read in (local_path, existing_path):
        with pytest.raises(ValueError) as caught:
            read(address, "f: `path`")
        said = str(caught.value)
        assert said.startswith("f: `path` must be on this machine; got ")
        assert "download it first" in said
        assert command in said
    with pytest.raises(ValueError, match="write to a local path and copy it there"):
        local_path(address, "f: `path`", target=True)


@pytest.mark.parametrize("name", FILES)
def test_a_name_with_a_colon_or_a_dot_is_a_file_name(name):
    assert not is_remote(name)
    assert str(local_path(name, "`path`")) == name.removeprefix("./")


@pytest.mark.parametrize("name", ["hf:a", "gs:b/x", "huggingface.co/a/b", "s3:/b/x"])
def test_an_existing_file_takes_precedence_over_an_address(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    assert existing_path(name, "`path`").exists()
    assert local_path(name, "`path`", target=True).exists()


@pytest.mark.parametrize("name", ["a/b", "BlinkDL/rwkv7-g1", "a-b/c.d", "fla-hub/rwkv"])
def test_a_hub_name_is_distinguished_from_a_missing_file(tmp_path, name):
    with pytest.raises(ValueError, match=f"hf download {name} --local-dir") as caught:
        existing_path(name, "`path`")
    missing = f"`path` must name an existing file or folder; `{name}` does not exist."
    assert str(caught.value).startswith(missing)
    with pytest.raises(ValueError, match=f"--repo-type dataset {name}"):
        refuse_hub_name(name, "`path`", kind="dataset")
    (tmp_path / name).parent.mkdir()
    with pytest.raises(ValueError, match="does not exist"):
        existing_path(name, "`path`")


def test_a_missing_suffix_is_named(tmp_path):
    (tmp_path / "rwkv-12.pth").write_text("")
    with pytest.raises(ValueError, match=r"rwkv-12` does not exist; `.*-12\.pth` does"):
        existing_path(tmp_path / "rwkv-12", "`path`")


@pytest.mark.parametrize("name", ["a/b.pth", "a/b/c", "b", "/a/b", "./a/b", "../a/b"])
def test_other_missing_paths_do_not_exist(name):
    with pytest.raises(ValueError, match="does not exist"):
        existing_path(name, "`path`")


def spellings(folder) -> list[str]:
    """Makes a file, and gives ways to write its path from the folder."""
    (folder / "b").mkdir()
    (folder / "x").write_text("text")
    (folder / "link").symlink_to("x")
    (folder / "to_b").symlink_to("b")
    return [
        "x",
        "./x",
        ".//x",
        "b/../x",
        "to_b/../x",
        "link",
        str(folder / "x"),
        f"../{folder.name}/x",
        "~/x",
    ]


def test_a_text_in_place_of_a_path_is_named_by_its_argument():
    text = "Write as a poet. " * 20
    message = (
        r"^`config.start` must be a path; got 340 characters, .*: 'Write as a poet\. "
    )
    with pytest.raises(ValueError, match=message):
        existing_path(text, "`config.start`")
    with pytest.raises(ValueError, match=message):
        local_path(text, "`config.start`", target=True)
    # Compared before the path is read; a name of a task or a prompt has no digest.
    assert content_digests({"start": text, "retention": "~nobody/text"}) == {}


def test_different_spellings_of_a_path_name_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in spellings(tmp_path):
        assert is_same("x", spelling), spelling
    for other in ("b", "y", "", "x/y", "\0"):
        assert not is_same("x", other), other
    assert not is_same("y", "y")


def test_a_list_may_not_name_a_file_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first, *others = spellings(tmp_path)
    (tmp_path / "y").write_text("text")
    for other in others:
        with pytest.raises(ValueError, match="`p` must name each file once; 'x' and "):
            split_paths(f"{first},y,{other}", "`p`")
    with pytest.raises(ValueError, match="'b' and 'b/'"):
        split_paths("b,b/", "`p`")
    # Written alike it is meant: a text that counts twice.
    assert split_paths("x,y,x", "`p`") == ("x", "y", "x")
    assert split_paths("missing,./missing", "`p`") == ("missing", "./missing")
    assert split_list("x,./x", "`p`") == ("x", "./x")


def write_observer(place):
    observer, params = tiny_observers.made()
    save_observer(place, observer, params)


WRITERS = {
    "model": lambda place: save_model(place, random_params(), CONFIG),
    "model file": lambda place: save_model(f"{place}.pth", random_params(), CONFIG),
    "state": lambda place: save_state(f"{place}.pth", random_state()),
    "observer": write_observer,
    "cache": lambda place: write_cache(["stdlib"], f"{place}.bin", Tokenizer.bytes()),
}


@pytest.mark.parametrize("address", ["gs://b/x", "s3:/b/x", "hf:a/b", "https://h/x"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_creates_a_folder_named_like_an_address(tmp_path, writer, address):
    for place in (address, pathlib.Path(address)):
        with pytest.raises(ValueError, match="must be on this machine"):
            WRITERS[writer](place)
    assert os.listdir(tmp_path) == []


READERS = {
    "model": load_model,
    "state": load_state,
    "observer": lambda place: load_observer(place, CONFIG),
    "observer's info": observer_info,
    "verify": verify,
    "text": lambda place: token_stream(place, Tokenizer.bytes()),
    "cache": lambda place: open_cache(place, Tokenizer.bytes()),
}


@pytest.mark.parametrize("name", ["hf:owner/name", "gs://b/x", "owner/name"])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_download_command_of_an_address(reader, name):
    with pytest.raises(ValueError, match="download it first") as caught:
        READERS[reader](name)
    assert name in str(caught.value)


def test_an_output_path_needs_a_writable_folder(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link.pth").symlink_to(mine / "model.pth")
    # Root may write everywhere, so permissions are asked of a stand-in.
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) == mine)
    for name in ("mine/new.pth", "mine/a/b", "link.pth"):
        check_target(tmp_path / name, "`path`")
    with pytest.raises(ValueError, match=r"must be in a folder; `.*file` is a file"):
        check_target(tmp_path / "file" / "x.pth", "`path`")
    # A folder is replaced by one that is made next to it.
    for name in ("x.pth", "new/x.pth", "mine"):
        with pytest.raises(ValueError, match="must be in a writable folder"):
            check_target(tmp_path / name, "`path`")


@pytest.mark.parametrize("name", ["bad\udcff", "bad\udcff/below"])
def test_a_folder_of_arrays_must_have_a_name_in_utf8(tmp_path, monkeypatch, name):
    # So Python spells a folder with a name in Latin-1, or any where the locale is C.
    with pytest.raises(
        ValueError, match=r"^`--workdir` must have a path in UTF-8; got"
    ):
        require_unicode(tmp_path / name, "`--workdir`")
    with pytest.raises(
        ValueError, match=r"^save_model: `path` must have a path in UTF"
    ):
        save_model(tmp_path / name, random_params(), CONFIG)
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"^save_model: `path` must have a path in UTF"
    ):
        save_model("relative", random_params(), CONFIG)
    assert os.listdir() == []
    require_unicode(tmp_path / "größe 中", "`--workdir`")


def test_circular_links_are_named_in_one_sentence(tmp_path):
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(ValueError, match=r"loop\.pth` does not exist"):
        load_model(tmp_path / "loop.pth")
    check_target(tmp_path / "loop.pth", "`target`")
    save_model(tmp_path / "loop.pth", random_params(), CONFIG)
    load_model(tmp_path / "loop.pth")


class Failing(io.FileIO):
    """A file on a disk that fails."""

    def read(self, size=-1):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", ["d.jsonl", "m.pth"])
def test_a_disk_error_names_the_file(tmp_path, monkeypatch, name):
    read = load_model if name == "m.pth" else lambda path: list(documents(path))
    (tmp_path / name).write_bytes(b"text" * 9)
    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Failing(path, "r"))
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert caught.value.errno == errno.EIO


def test_an_error_that_names_its_file_or_has_no_errno_is_unchanged():
    for error in (
        FileNotFoundError(errno.ENOENT, "none", "y"),
        OSError("of a library"),
    ):
        with pytest.raises(OSError) as caught, name_in_errors("x"):
            raise error
        assert caught.value is error
