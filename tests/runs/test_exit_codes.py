"""The exit codes of the programs, and the reason as the last line on stderr."""

import jax
import pytest

from rwkv7_jax.runs.exit_codes import (
    DiskError,
    NotFinite,
    NoValidCheckpoint,
    Stopped,
    check_stopped_code,
    exit_code,
)
from rwkv7_jax.runs.process import exit_with_code

# How TensorStore says that a disk is full, in a word that XLA has for memory.
FULL = "Failed to write 624898 bytes to file 4: No space left on device [os_error_code='28']"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), 2),
        (FileNotFoundError(2, "no", "x"), 2),
        (NoValidCheckpoint("no"), 3),
        (NotFinite("no"), 4),
        (DiskError("no"), 5),
        (OSError(28, "No space left on device"), 5),
        (ValueError(f"RESOURCE_EXHAUSTED: {FULL}"), 5),
        (DiskError("not written (RESOURCE_EXHAUSTED: Error writing"), 5),
        (ValueError("Gloo all-reduce failed"), 6),
        (Stopped("no"), 0),
        (Stopped("no", 75), 75),
    ],
)
def test_each_end_has_its_code_and_says_why_on_the_last_line(error, code, capfd):
    with pytest.raises(SystemExit) as caught, exit_with_code("train.py"):
        raise error
    assert caught.value.code == code
    assert capfd.readouterr().err == f"train.py: {error}\n"


@pytest.mark.parametrize("code", [1, 2, 7, 126, 130, 256, -1])
def test_a_stopped_run_takes_no_code_that_means_something_else(code):
    assert [check_stopped_code(free) for free in (0, 8, 75, 125)] == [0, 8, 75, 125]
    with pytest.raises(ValueError, match=f"`--stopped_code` must be 0 .*; got {code}."):
        check_stopped_code(code)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), exit_with_code("train.py"):
        raise KeyError("x")


def test_jax_still_has_no_class_for_a_lost_process():
    # When this fails, `exit_code` can ask for that class in place of the word Gloo in the message.
    assert jax.errors.JaxRuntimeError.__subclasses__() == []
    assert exit_code(jax.errors.JaxRuntimeError("Gloo all-reduce failed")) == 6
