"""Results are written before anything is printed, and errors have the common exit codes."""

import errno
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import random_params

from rwkv7_jax.checkpoints import (
    load_model,
    load_state,
    model_hash,
    save_model,
    save_state,
)
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.state_sidecar import sidecar
from rwkv7_jax.checkpoints.tensor_files import read_tensors
from rwkv7_jax.cli.commands import main
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import init_state
from rwkv7_jax.observer.files import save_observer
from rwkv7_jax.observer.observer import init_observer

# What the loader says of `merged.pth`, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:.* holds a tuned state as well")

CONFIG = RWKV7Config(vocab_size=257, num_layers=1, width=32, head_size=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a model with a state merged into it, states, an observer and a text."""
    folder = tmp_path_factory.mktemp("made")
    params = random_params(CONFIG, dtype=jnp.float32, scale=0.3)
    save_model(folder / "m.pth", params, CONFIG)
    wkv = np.random.default_rng(0).normal(size=init_state(CONFIG).wkv.shape)
    state = init_state(CONFIG).replace(wkv=jnp.asarray(wkv, jnp.float32))
    for name in ("a.pth", "b.pth"):
        save_state(folder / name, state)
    merged = {**read_tensors(folder / "m.pth"), **read_tensors(folder / "a.pth")}
    tensors = [(name, tensor.read()) for name, tensor in merged.items()]
    write_pth(folder / "merged.pth", tensors)
    observer, maps = init_observer(CONFIG, CONFIG, jax.random.key(0))
    info = {"base_model": model_hash(params, CONFIG)}
    save_observer(folder / "o", observer, maps | {"model": params}, info=info)
    (folder / "t.txt").write_bytes(b"The sea is deep. " * 60)
    return folder


@pytest.fixture
def files(made, tmp_path, monkeypatch):
    """A copy of these files, in the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Command lines, and the files that they write.
WRITING = [
    ("convert m.pth out.st", ["out.st"]),
    ("convert merged.pth out.pth", ["out.pth", "out.state.pth"]),
    ("data t.txt out --vocabulary bytes", ["out.bin", "out.idx", "out.card.json"]),
    ("generate --model m.pth --prompt a --tokens 9 --save-state out.pth", ["out.pth"]),
    (
        "generate --model m.pth --prompt a --tokens 2 --json --save-state out.pth",
        ["out.pth"],
    ),
    ("observe o --model m.pth --prompt ab --out out.pth", ["out.pth"]),
    ("state mix a.pth b.pth out.pth --weights 1,1", ["out.pth"]),
    ("state scale a.pth --alpha -2e0 out.st", ["out.st"]),
    (
        "state doctor a.pth --model m.pth --data t.txt --length 32 --windows 2 "
        "--picture out.png",
        ["out.png"],
    ),
]


@pytest.mark.parametrize(("line", "written"), WRITING, ids=lambda value: str(value))
def test_a_closed_pipe_does_not_lose_a_result(files, monkeypatch, capfd, line, written):
    if "--picture" in line:
        pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(line.split()) == 0
    assert capfd.readouterr() == ("", "")
    for name in written:
        assert (files / name).stat().st_size


def test_a_session_is_saved_in_full_when_its_pipe_is_closed(files, monkeypatch):
    words = "generate --model m.pth --prompt ab --tokens 12 --save-state".split()
    assert main([*words, "whole.pth"]) == 0
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        main([*words, "lonely.pth"])
    one = load_state(files / "whole.pth")
    two = load_state(files / "lonely.pth")
    np.testing.assert_array_equal(one.wkv, two.wkv)


def test_a_full_disk_for_printed_text_is_reported_after_the_state_is_saved(
    files, monkeypatch, capsys
):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    words = "generate --model m.pth --prompt ab --tokens 9 --save-state s.pth".split()
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(words) == 5
        # Python would try once more when the stream is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    said = capsys.readouterr().err
    assert said == "rwkv7: `standard output`: No space left on device.\n"
    assert np.any(load_state(files / "s.pth").wkv)


def test_an_error_without_a_reader_keeps_its_exit_code(files, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main(["inspect", "missing.pth"]) == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())


def test_a_closed_standard_input_counts_as_empty(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["observe", "o", "--model", "m.pth", "--prompt", "-"]) == 2
    closed = capsys.readouterr().err
    assert main(["observe", "o", "--model", "m.pth", "--prompt", ""]) == 2
    assert closed == capsys.readouterr().err
    sys.stdin.close()


# A command line, and the function that fails in it.
FAILING = [
    ("convert m.pth out.pth", "rwkv7_jax.checkpoints.model_files.build_tree"),
    ("inspect m.pth", "rwkv7_jax.checkpoints.model_files.build_tree"),
    ("inspect --state a.pth", "rwkv7_jax.checkpoints.state_files._build_state"),
    ("data t.txt out", "rwkv7_jax.data.token_cache._write_documents"),
    ("data t.txt --show 1 --length 9", "rwkv7_jax.cli.data.batch_at"),
    ("generate --model m.pth --prompt a", "rwkv7_jax.cli.generate.generate"),
    (
        "observe o --model m.pth --prompt ab --out s.pth",
        "rwkv7_jax.cli.observe.propose",
    ),
    ("state info a.pth", "rwkv7_jax.cli.state.head_statistics"),
    ("state mix a.pth b.pth s.pth --weights 1,1", "rwkv7_jax.cli.state.weighted_sum"),
    ("state scale a.pth --alpha 2 s.pth", "rwkv7_jax.cli.state.scaled"),
    (
        "state doctor a.pth --model m.pth --data t.txt --length 32",
        "rwkv7_jax.cli.state_doctor.diagnose",
    ),
]

ERRORS = [
    (MemoryError(), 7),
    (MemoryError("Unable to allocate 3.5 TiB"), 7),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand pages"), 7),
    (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), 7),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 7),
    (OSError(errno.ENOSPC, "No space left on device", "out.pth"), 5),
    (PermissionError(errno.EACCES, "Permission denied", "out.pth"), 2),
    (OverflowError("too large"), 2),
    (NotImplementedError("not for this device"), 2),
]


@pytest.mark.parametrize(("line", "place"), FAILING, ids=lambda value: str(value))
def test_every_command_ends_with_the_code_of_its_error(
    files, monkeypatch, capsys, line, place
):
    before = sorted(os.listdir())
    for error, code in ERRORS:

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(place, fail)
        assert main(line.split()) == code, error
        shown, said = capsys.readouterr()
        assert shown == ""
        # A progress bar is drawn over and over on one line before the error's own.
        assert said.count("rwkv7: ") == 1
        assert said.endswith("\n")
        said = said[said.index("rwkv7: ") :]
        assert said.count("\n") == 1
        if code == 7:
            assert said.startswith("rwkv7: out of memory (")
            assert "use a smaller model" in said
    assert sorted(os.listdir()) == before


def test_a_bug_keeps_its_traceback(files, monkeypatch):
    def fail(*arguments):
        raise KeyError("x")

    monkeypatch.setattr("rwkv7_jax.cli.state.scaled", fail)
    with pytest.raises(KeyError):
        main("state scale a.pth --alpha 2 s.pth".split())


SAME = ["{}", "./{}", "sub/../{}", "link_{}", "ABSOLUTE/{}"]


@pytest.mark.parametrize("spelling", SAME)
def test_a_result_may_replace_its_source_under_any_spelling_of_the_path(
    files, spelling
):
    (files / "sub").mkdir()

    def spell(name):
        if spelling.startswith("link_"):
            (files / f"link_{name}").symlink_to(name)
        return spelling.format(name).replace("ABSOLUTE", str(files))

    weights = load_model("m.pth")[0]["emb"]["weight"]
    wkv = np.asarray(load_state("a.pth").wkv)
    assert main(["convert", "m.pth", spell("m.pth"), "--dtype", "bfloat16"]) == 0
    half = load_model("m.pth")[0]["emb"]["weight"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, weights.astype(jnp.bfloat16))
    assert main(["state", "scale", "a.pth", "--alpha", "2", spell("a.pth")]) == 0
    np.testing.assert_array_equal(load_state("a.pth").wkv, 2 * wkv)
    mix = ["state", "mix", "b.pth", "b.pth", spell("b.pth"), "--weights", "2,-1"]
    assert main(mix) == 0
    np.testing.assert_array_equal(load_state("b.pth").wkv, wkv)
    # The state that is merged into the model is read before the model is replaced.
    assert main(["convert", "merged.pth", spell("merged.pth")]) == 0
    link = "link_" if spelling.startswith("link_") else ""
    np.testing.assert_array_equal(load_state(f"{link}merged.state.pth").wkv, wkv)
    assert sidecar(files / f"{link}merged.state.pth").exists()


def test_an_id_without_a_vocabulary_entry_has_no_text_and_does_not_end_the_program(
    files, capsys
):
    # World's entries end before the model's ids: what is sampled there has no bytes.
    config = RWKV7Config(vocab_size=65536, num_layers=1, width=32, head_size=16)
    params = random_params(config, dtype=jnp.float32, scale=0.1)
    # The last id wins at every step.
    params["ln_out"]["weight"] = jnp.zeros_like(params["ln_out"]["weight"])
    params["ln_out"]["bias"] = jnp.ones_like(params["ln_out"]["bias"])
    head = jnp.zeros_like(params["head"]["weight"])
    params["head"]["weight"] = head.at[-1].set(1.0)
    save_model("wide.pth", params, config)
    words = "generate --model wide.pth --prompt a --tokens 3 --temperature 0".split()
    assert main(words) == 0
    shown, said = capsys.readouterr()
    assert (
        said == "note: 3 of the 3 ids decode to nothing in world; the first is 65535.\n"
    )
    assert shown == "\n"
    assert main([*words, "--json"]) == 0
    assert capsys.readouterr().out.count("65535") >= 3
