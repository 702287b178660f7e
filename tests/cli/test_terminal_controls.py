"""Control characters in untrusted text are shown on a terminal, and never take effect."""

import io
import json
import logging
import sys
import types
import warnings

import pytest

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.cli.answers import Stream
from rwkv7_jax.cli.commands import main
from rwkv7_jax.runs import exit_codes, process
from rwkv7_jax.serving.state_files import StateFiles

# Clears the screen, writes to the clipboard, and says the same in eight bits.
HOSTILE = "\x1b[2J\x1b]52;c;aGk=\x07\x9b2J\x7f\rgone\b\x00"

ESCAPED = r"\x1b[2J\x1b]52;c;aGk=\x07\x9b2J\x7f\x0dgone\x08\x00"


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def terminal_of(monkeypatch):
    """Standard output as a terminal; pytest puts its own stream back after fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def test_all_controls_but_line_breaks_and_tabs_are_escaped():
    assert escape_controls(HOSTILE) == ESCAPED
    kept = "\n\t \\x1b \u00a0\u00e4\U0001f600 \u05d0\u200f"
    assert escape_controls(kept) == kept
    for number in range(0x100):
        shown = escape_controls(chr(number))
        assert shown == (
            chr(number)
            if chr(number).isprintable() or chr(number) in "\n\t\xa0\xad"
            else f"\\x{number:02x}"
        )


def test_an_answer_is_escaped_on_a_terminal(monkeypatch):
    terminal = terminal_of(monkeypatch)
    stream = Stream(goes_on=False)
    # Also where the control comes in two pieces.
    for piece in (HOSTILE, "\x1b", "[2J \u00e4"):
        stream(piece, 0)
    assert terminal.getvalue() == ESCAPED + "\\x1b[2J \u00e4"


def test_an_answer_goes_to_a_pipe_unchanged(capsys):
    Stream(goes_on=False)(HOSTILE, 0)
    assert capsys.readouterr().out == HOSTILE


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a" + HOSTILE}))
    return str(path)


def test_rows_of_data_are_escaped_on_a_terminal(text_file, monkeypatch):
    terminal = terminal_of(monkeypatch)
    words = ["data", "--show", "1", "--vocabulary", "bytes", text_file]
    assert main([*words, "--packing", "documents"]) == 0
    assert ESCAPED in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


def test_rows_of_data_go_to_a_pipe_unchanged(text_file, capsys):
    words = ["data", "--show", "1", "--vocabulary", "bytes", text_file]
    assert main([*words, "--packing", "documents"]) == 0
    assert HOSTILE in capsys.readouterr().out


@pytest.mark.parametrize("is_there", [False, True])
def test_an_error_names_a_file_without_its_controls(tmp_path, capsys, is_there):
    path = tmp_path / "\x1b[2J\x9b2J.pth"
    if is_there:
        path.write_bytes(b"no model")
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J\x9b2J.pth" in error
    assert "\x1b" not in error and "\x9b" not in error


def test_errors_of_train_and_eval_have_no_controls(capsys):
    with pytest.raises(SystemExit), process.exit_with_code("train.py"):
        raise ValueError(HOSTILE)
    assert capsys.readouterr().err == f"train.py: {ESCAPED}\n"


def test_warnings_have_no_controls(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    process.warn_in_one_line()
    line = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "a.py", 1)
    assert line == f"warning: {ESCAPED}\n"
    exit_codes.warn(HOSTILE)
    assert capsys.readouterr().err == f"warning: {ESCAPED}\n"


def test_the_log_of_a_server_has_no_controls(tmp_path, caplog):
    folder = tmp_path / "\x1b[2J"
    folder.mkdir()

    def load(path):
        raise ValueError(f"{path}: {HOSTILE}")

    states = StateFiles({}, [folder], suffixes=(".pth",), load=load)
    (folder / "poet.pth").write_bytes(b"no state")
    with caplog.at_level(logging.WARNING):
        states.refresh(types.SimpleNamespace(state_names=(), put_state=None))
    (record,) = caplog.records
    assert ESCAPED in record.getMessage() and "\x1b" not in record.getMessage()
