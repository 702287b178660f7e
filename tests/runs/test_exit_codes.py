"""The exit codes of the programs, and the reason as the last line on stderr."""

import jax
import pytest

from rwkv7_jax.runs.exit_codes import (
    DiskError,
    InUse,
    NotFinite,
    NoValidCheckpoint,
    Stopped,
    check_stopped_code,
    exit_code,
    is_out_of_memory,
)
from rwkv7_jax.runs.process import exit_with_code

# How TensorStore says that a disk is full, in a word that XLA has for memory.
FULL = "Failed to write 624898 bytes to file 4: No space left on device [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), 2),
        (FileNotFoundError(2, "no", "x"), 2),
        (InUse("no"), 75),
        (NoValidCheckpoint("no"), 3),
        (NotFinite("no"), 4),
        (DiskError("no"), 5),
        (OSError(28, "No space left on device"), 5),
        (ValueError(f"RESOURCE_EXHAUSTED: {FULL}"), 5),
        (DiskError("not written (RESOURCE_EXHAUSTED: Error writing"), 5),
        (Stopped("no"), 0),
        (Stopped("no", 75), 75),
    ],
)
def test_each_error_has_its_code_and_gives_its_reason_on_the_last_line(
    error, code, capfd
):
    with pytest.raises(SystemExit) as caught, exit_with_code("train.py"):
        raise error
    assert caught.value.code == code
    assert capfd.readouterr().err == f"train.py: {error}\n"


LOST = (
    ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
    jax.errors.JaxRuntimeError("Gloo context initialization failed: timeout"),
)


@pytest.fixture
def joined(monkeypatch):
    """Makes this process appear to have joined others."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)


@pytest.mark.usefixtures("joined")
def test_a_lost_process_has_code_6():
    assert [exit_code(error) for error in LOST] == [6, 6]


def test_a_run_of_one_process_cannot_lose_a_process():
    assert [exit_code(error) for error in LOST] == [2, None]


# Words that stand for a lost process, for memory and for a disk, in names of files.
PATHS = ("Gloom.txt", "Gloo failed", "out_of_memory/x", "no space left on device/x")


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda path: FileNotFoundError(2, "No such file", path), 2),
        (lambda path: ValueError(f"`{path}` must be a file; it is absent."), 2),
        (lambda path: OSError(f"`{path}` must be a file; it is absent."), 2),
        (lambda path: RuntimeError(f'a bug at "{path}"'), None),
        (lambda path: NoValidCheckpoint(f"no checkpoint in {path} is intact"), 3),
        (lambda path: NotFinite(f"the batches are in {path}"), 4),
        (lambda path: DiskError(f"`--workdir` {path} cannot be written."), 5),
    ],
)
def test_words_in_a_path_do_not_change_the_code(error, code, path):
    made = error(path)
    assert exit_code(made) == code
    assert not is_out_of_memory(made)
    # Of a chain of errors every one is asked.
    outer = RuntimeError("the thread ended")
    outer.__cause__ = made
    assert not is_out_of_memory(outer)


@pytest.mark.parametrize("code", [1, 2, 7, 126, 130, 256, -1])
def test_a_stopped_code_with_another_meaning_is_rejected(code):
    assert [check_stopped_code(free) for free in (0, 8, 75, 125)] == [0, 8, 75, 125]
    with pytest.raises(ValueError, match=f"`--stopped_code` must be 0 .*; got {code}."):
        check_stopped_code(code)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), exit_with_code("train.py"):
        raise KeyError("x")


def test_jax_still_has_no_class_for_a_lost_process():
    # When this fails, `exit_code` can ask for that class in place of the word Gloo in the message.
    assert jax.errors.JaxRuntimeError.__subclasses__() == []
