"""Error messages: the public function's name, the first line, escaped control characters."""

import contextlib
import contextvars
import re
from collections.abc import Iterator

# Control characters of ASCII and Latin-1, except line feeds and tabs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_inside = contextvars.ContextVar("a `prefix_errors` block is active", default=False)


@contextlib.contextmanager
def prefix_errors(function: str) -> Iterator[None]:
    """Prefixes the message of an error from an argument check with "function: ".

    Put it around the checks at the top of a public function, not around its work: later errors
    should name the function in which they occur. The outermost block wins, so a public function may
    call another one to check its arguments. Type and traceback do not change.

    Args:
        function: the name of the public function.
    """
    if _inside.get():
        yield
        return
    token = _inside.set(True)
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        # Subclasses such as UnicodeDecodeError build their message from other arguments.
        if type(error) in (TypeError, ValueError, ImportError):
            message = f"{function}: {error}"
            error.args = (message, *error.args[1:])
            if isinstance(error, ImportError):
                error.msg = message
        raise
    finally:
        _inside.reset(token)


def first_line(error: BaseException | str, *, limit: int | None = 200) -> str:
    """Returns the first line of a library's error message, or the error's type if it is empty.

    The line is printable and has no final full stop.

    Args:
        error: the error, or its message.
        limit: the maximum number of characters; None for no limit.
    """
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = text.splitlines()[0][:limit]
    printable = [character if character.isprintable() else "?" for character in line]
    return "".join(printable).rstrip(".")


def escape_controls(text: str) -> str:
    """Escapes control characters, except line feeds and tabs.

    Otherwise untrusted text, such as a file name or a model's answer, could move a terminal's
    cursor, overwrite lines or set the clipboard.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
