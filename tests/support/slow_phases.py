"""A phase of a program that takes until its user is told what is waited for."""

import time

import pytest

from rwkv7_jax.runs import waiting

# Seconds after which a phase ends although nothing was said.
_LIMIT = 30.0


class SlowPhase:
    """A function that returns after the first message on stderr.

    Attributes:
        said: what was printed on stderr meanwhile.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys, *, error=None):
        """Shortens the time to the first message.

        Args:
            monkeypatch: the fixture.
            capsys: the fixture.
            error: what the function raises at its end; None to return None.
        """
        monkeypatch.setattr(waiting, "SECONDS", 0.02)
        self._capsys = capsys
        self._error = error
        self.said = ""

    def __call__(self, *_, **__):
        """Waits for a message, and forgets those of earlier phases."""
        self._capsys.readouterr()
        end = time.monotonic() + _LIMIT
        while not self.said and time.monotonic() < end:
            time.sleep(0.01)
            self.said += self._capsys.readouterr().err
        if self._error is not None:
            raise self._error
