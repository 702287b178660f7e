"""Signals, streams and hooks of a program, and whether each workaround is still needed."""

import errno
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from jax.experimental import multihost_utils
from run_programs import ROOT
from saved_steps import IDENTITY, new_state, open_checkpoints, save_steps, train_state

from rwkv7_jax.checkpoints.orbax_import import is_abandoned_read
from rwkv7_jax.runs import process
from rwkv7_jax.runs.exit_codes import NoValidCheckpoint, Stopped
from rwkv7_jax.runs.process import StopSignals, hold_interrupt, write_lines_at_once


def run_python(code: str, **options) -> subprocess.Popen:
    """Starts Python with a few lines of code."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_signal_is_a_stop_request_and_ends_an_interruptible_block():
    with StopSignals() as stop:
        assert not stop.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop() and stop.requested == "SIGTERM"
        with pytest.raises(Stopped, match="stopped by SIGTERM"), stop.interruptible():
            raise AssertionError(
                "a request that is there already ends the block before it begins"
            )
    with StopSignals() as stop, pytest.raises(Stopped), stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_stopped_by_a_signal_has_the_requested_exit_code():
    for code in (0, 75):
        stop = StopSignals(code)
        with stop, pytest.raises(Stopped) as ended, stop.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert ended.value.code == stop.stopped().code == code


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_program_without_a_loop_has_the_shells_code_for_a_signal(name):
    number = getattr(signal, name)
    stop = StopSignals(None)
    with (
        stop,
        pytest.raises(Stopped, match=f"by {name}") as ended,
        stop.interruptible(),
    ):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert ended.value.code == 128 + number


def test_a_held_interrupt_ends_nothing_but_a_second_one_does():
    stop = StopSignals(None)
    with stop, pytest.raises(Stopped, match="SIGINT"), stop.interruptible():
        for _ in range(2):
            with hold_interrupt() as came:
                assert not came()
                signal.raise_signal(signal.SIGINT)
                assert came() and not stop.requested
        with hold_interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second one ends the block")
    with pytest.raises(KeyboardInterrupt), hold_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


DROPPED = """
import gc, os, signal, time
from rwkv7_jax.runs.process import program
with program("eval.py"):
    gc.callbacks.append(lambda when, _: when == "stop" or os.kill(os.getpid(), {number}))
    # The signal comes again soon: written at once, and inside of what cleans up.
    try:
        gc.collect()
        gc.callbacks.pop()
        os.write(1, b"goes on\\n")
        time.sleep(60)
    finally:
        os.write(1, b"cleans up\\n")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost(name):
    # Python drops what the handler raises there. JAX has such a callback, so it is no rare place.
    number = int(getattr(signal, name))
    child = run_python(DROPPED.format(number=number))
    out, error = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    # On a busy machine the signal may come again before the program has written that it goes on.
    assert out.removeprefix("goes on\n") == "cleans up\n"
    assert error == f"eval.py: stopped by {name}.\n"


COMMAND = """
import os, signal, sys
from rwkv7_jax.cli import commands
commands._doctor = lambda options: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["rwkv7", "doctor"]
sys.exit(commands.main())
"""

PROGRAM = """
import os, signal
from rwkv7_jax.runs.process import program
with program("eval.py"):
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""


@pytest.mark.parametrize(
    ("code", "said"), [(COMMAND, ""), (PROGRAM, "eval.py: stopped by SIGTERM.\n")]
)
def test_a_signal_ends_commands_and_programs_with_the_shells_code(code, said):
    out, error = (child := run_python(code)).communicate(timeout=60)
    assert (child.returncode, out, error) == (143, "", said)


def test_several_processes_stop_by_their_common_vote():
    wishes = []

    def vote(wish: bool) -> bool:
        wishes.append(wish)
        return len(wishes) == 2

    stop = StopSignals()
    stop.agree_with(vote)
    assert [stop.should_stop(), stop.should_stop()] == [False, True]
    assert wishes == [False, False]
    assert stop.requested == "a signal to another process"


BUSY = """
import hashlib
from rwkv7_jax.runs.process import StopSignals
with StopSignals({code}):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""


def test_a_second_interrupt_ends_a_program_that_is_busy_in_c():
    # Its main thread is inside one call of C, as while it compiles: no signal handler runs there.
    child = run_python(BUSY.format(code=75))
    assert child.stdout.readline() == "busy\n"
    for _ in range(2):
        child.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, error = child.communicate(timeout=30)
    assert child.returncode == 130 and "exited at once" in error


def test_a_lost_terminal_does_not_keep_a_program_from_ending(monkeypatch):
    codes = []

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(process.os, "write", fail)
        patched.setattr(process.os, "_exit", codes.append)
        patched.setattr(process, "_flush", fail)
        process._exit_at_once(129, "stopped by SIGHUP.")
    assert codes == [129]


@pytest.mark.parametrize(("asked", "code"), [(0, 0), (75, 75), (None, 143)])
def test_a_signal_ends_a_program_that_does_not_poll_and_has_nothing_to_save(
    asked, code
):
    child = run_python(BUSY.format(code=asked))
    assert child.stdout.readline() == "busy\n"
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=30)
    assert child.returncode == code
    assert "stopped by SIGTERM; there was nothing to save" in error


def test_jax_still_ignores_signals_in_a_run_of_one_process():
    # When this fails, JAX's preemption service could take the place of our signal handlers.
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not multihost_utils.reached_preemption_sync_point(1)


PRINT_ON = """
import sys
from rwkv7_jax.runs.process import ignore_broken_pipe
if {quiet}:
    ignore_broken_pipe()
print("first", flush=True)
sys.stdin.readline()
for _ in range(3):
    print("more", flush=True)
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_output_without_a_reader_does_not_end_a_program(quiet):
    child = run_python(PRINT_ON.format(quiet=quiet), stdin=subprocess.PIPE)
    assert child.stdout.readline() == "first\n"
    child.stdout.close()
    child.stdin.close()
    error = child.stderr.read()
    child.stderr.close()
    if quiet:
        assert child.wait(60) == 0 and error == ""
    else:
        # Python's own way; when this fails, the stream proxies are not needed any more.
        assert child.wait(60) != 0 and "BrokenPipeError" in error


@pytest.fixture
def unraisable(monkeypatch):
    """The argument of `sys.unraisablehook`."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    yield found
    gc.collect()


ABANDON = """
from rwkv7_jax.runs.process import ignore_abandoned_reads
if {quiet}:
    ignore_abandoned_reads()
async def read():
    pass
read()
"""


@pytest.mark.parametrize("quiet", [True, False])
def test_a_read_that_never_started_warns_only_without_the_filter(quiet):
    child = run_python(ABANDON.format(quiet=quiet))
    _, error = child.communicate(timeout=60)
    assert child.returncode == 0
    assert ("never awaited" in error) == (not quiet)


WARN = """
import warnings
from rwkv7_jax.runs.process import warn_in_one_line
warn_in_one_line()
warnings.warn("text")
warnings.warn("of Python", RuntimeWarning)
"""


def test_warnings_for_users_are_one_line_and_others_name_their_location():
    child = run_python(WARN)
    _, error = child.communicate(timeout=60)
    first, *others = error.splitlines()
    assert first == "warning: text"
    assert "RuntimeWarning: of Python" in others[0]


def read_damaged_copies(saved, copy):
    """Damages each file of a checkpoint in turn, and reads what is left."""
    data = saved / "3" / "train"
    files = [path for path in data.rglob("*") if path.is_file()]
    for path in sorted(files):
        raw = path.read_bytes()
        for damaged in (raw[: len(raw) // 2], bytes(len(raw))):
            shutil.copytree(saved, copy)
            (copy / path.relative_to(saved)).write_bytes(damaged)
            with pytest.raises(NoValidCheckpoint):
                open_checkpoints(copy).restore(train_state(0), IDENTITY, new_state)
            shutil.rmtree(copy)


@pytest.mark.slow
def test_orbax_still_abandons_reads_when_one_of_them_fails(tmp_path, unraisable):
    # When this fails, `hide_abandoned_reads` is not needed any more.
    save_steps(tmp_path / "saved", [3])
    # Which reads are left depends on the moment at which one fails: a busy machine may leave none.
    for _ in range(10):
        read_damaged_copies(tmp_path / "saved", tmp_path / "copy")
        gc.collect()
        if unraisable:
            break
    assert unraisable
    assert all(is_abandoned_read(one) for one in unraisable)


CLOSED = """
import sys
from rwkv7_jax.runs.exit_codes import warn
from rwkv7_jax.runs.process import program
with program("train.py"):
    print("caf\\u00e9 \\u4e2d")
    warn("caf\\u00e9 \\u4e2d")
    open({path!r}, "w").write("done")
"""


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "<&-", ">/dev/full"])
@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_closed_full_or_narrow_streams_do_not_end_a_program(tmp_path, closed, encoding):
    path = tmp_path / "result"
    code = CLOSED.format(path=str(path))
    words = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run(
        words, cwd=ROOT, capture_output=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert path.read_text() == "done"
    assert b"Traceback" not in ended.stderr


def test_closing_the_pipe_of_the_help_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "eval.py", "--help"]
    ended = subprocess.run(
        words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    "words",
    ["train.py --config=none.py", "eval.py --config=none.py", "-m rwkv7_jax.cli data"],
)
def test_an_interrupt_during_the_imports_is_quiet(words):
    child = subprocess.Popen(
        [sys.executable, *words.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.7)
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=60)
    # On an idle machine the imports may have ended before the signal.
    assert child.returncode in (130, 2)
    assert "Traceback" not in error and out == ""


def test_a_line_reaches_a_file_as_soon_as_it_is_complete(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    print("first")
    assert raw.getvalue() == b""
    write_lines_at_once()
    print("second")
    assert raw.getvalue() == b"first\nsecond\n"
