"""Pipes and devices in the place of files: one sentence, no wait, and nothing is replaced.

All of them are made in a folder of the test: whoever may do everything could replace real ones.
"""

import os
import signal
import stat

import pytest
from random_checkpoints import CONFIG, random_params, random_state

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints.integrity.verification import verify
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_logits, load_state, save_state
from rwkv7_jax.checkpoints.state_sidecar import read_sidecar
from rwkv7_jax.data.jsonl import read_log
from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.token_cache import open_cache, read_card, write_cache
from rwkv7_jax.json_files import read_json, write_json
from rwkv7_jax.reports.html_report import report_page
from rwkv7_jax.test_time.completion_cache import CompletionCache
from rwkv7_jax.test_time.questions import read_questions
from rwkv7_jax.test_time.traces import read_traces, write_traces
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary

BYTES = Tokenizer.bytes()


def write_text_cache(path):
    """Writes a cache of one document."""
    source = path.with_name("source.txt")
    source.write_text("abc")
    write_cache([source], path, BYTES)


READERS = {
    "load_model": ("m.pth", load_model),
    "load_model of safetensors": ("m.safetensors", load_model),
    "verify": ("m.pth", verify),
    "load_state": ("s.pth", load_state),
    "load_logits": ("s.safetensors", load_logits),
    "documents": ("d.jsonl", lambda path: list(documents(path))),
    "documents of a table": ("d.csv", lambda path: list(documents(path))),
    "read_card": ("c.card.json", lambda path: read_card(path.with_name("c.bin"))),
    "open_cache": ("c.bin", lambda path: open_cache(path, BYTES)),
    "read_traces": ("t.jsonl", read_traces),
    "CompletionCache": ("t.jsonl", CompletionCache),
    "read_questions": ("q.jsonl", lambda path: list(read_questions(path, BYTES))),
    "load_vocabulary": ("v.txt", load_vocabulary),
}

WRITERS = {
    "save_state": ("s.pth", lambda path: save_state(path, random_state())),
    "save_model": ("m.pth", lambda path: save_model(path, random_params(), CONFIG)),
    "write_traces": ("t.jsonl", lambda path: write_traces(path, [])),
    "write_json": ("x.json", lambda path: write_json(path, {})),
    "write_cache": ("c.bin", write_text_cache),
}


class Waits(BaseException):
    """A call that waits for a writer of a pipe; no `except Exception` hides it."""


@pytest.fixture(autouse=True)
def no_waiting():
    """Ends a test that waits, in place of all tests."""

    def end(number, frame):
        raise Waits

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def make_pipe(path, kind):
    """Makes a pipe at a path, or a link that leads to one."""
    if kind == "link":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("door", READERS)
def test_a_pipe_is_rejected_without_waiting(tmp_path, door, kind):
    name, read = READERS[door]
    make_pipe(tmp_path / name, kind)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("door", WRITERS)
def test_a_pipe_is_not_replaced(tmp_path, door, kind):
    name, write = WRITERS[door]
    make_pipe(tmp_path / name, kind)
    with pytest.raises(ValueError, match="a device or a pipe"):
        write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)
    assert (tmp_path / name).is_symlink() == (kind == "link")


def test_a_device_file_is_not_replaced(tmp_path):
    device = tmp_path / "device"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")
    with (
        pytest.raises(ValueError, match="it is a device or a pipe"),
        atomic_write(device) as file,
    ):
        file.write(b"x")
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize(
    "name", ["config.json", "rwkv7_jax.json", "model.safetensors.index.json"]
)
def test_a_pipe_in_a_model_folder_is_rejected(tmp_path, name):
    save_model(tmp_path / "model.safetensors", random_params(), CONFIG)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}. must be a file"):
        load_model(tmp_path)


def test_a_pipe_as_a_sidecar_is_rejected(tmp_path):
    path = tmp_path / "s.pth"
    save_state(path, random_state())
    (tmp_path / "s.pth.json").unlink()
    os.mkfifo(tmp_path / "s.pth.json")
    for read in (load_state, read_sidecar):
        with pytest.raises(ValueError, match=r"s.pth.json. must be a file"):
            read(path)


def test_a_pipe_beside_a_token_cache_is_rejected(tmp_path):
    write_text_cache(tmp_path / "c.bin")
    for name in ("c.idx", "c.card.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}. must be a file"):
            open_cache(tmp_path / "c.bin", BYTES)


def test_a_report_ignores_pipes(tmp_path):
    for name in ("settings.json", "metrics.jsonl", "events.jsonl", "plot.png"):
        os.mkfifo(tmp_path / name)
    assert report_page(tmp_path).startswith("<!DOCTYPE html>")
    assert read_json(tmp_path / "settings.json") is None
    assert read_log(tmp_path / "metrics.jsonl") == []
