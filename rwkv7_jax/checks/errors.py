"""Messages of errors: the name of the public function, the first line, what terminals obey."""

import contextlib
import contextvars
import re
from collections.abc import Iterator

# What terminals obey, of ASCII and of the eight bits after it; line breaks and tabs are harmless.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_inside = contextvars.ContextVar("a `prefix_errors` block is active", default=False)


@contextlib.contextmanager
def prefix_errors(function: str) -> Iterator[None]:
    """Puts "function: " before the message of an error that an argument check raises.

    Put it around the checks at the top of a public function, not around its work: whatever fails
    later should name the function in which it fails. The outermost block wins, so a public function
    may check its arguments with the help of another one. Type and traceback stay as they are.

    Args:
        function: the name of the public function, for messages.
    """
    if _inside.get():
        yield
        return
    token = _inside.set(True)
    try:
        yield
    except (TypeError, ValueError, ImportError) as error:
        # Subclasses such as UnicodeDecodeError make their message from other arguments.
        if type(error) in (TypeError, ValueError, ImportError):
            message = f"{function}: {error}"
            error.args = (message, *error.args[1:])
            if isinstance(error, ImportError):
                error.msg = message
        raise
    finally:
        _inside.reset(token)


def first_line(error: BaseException, *, limit: int | None = 200) -> str:
    """Returns the first line of a message, or the error's kind where it has none.

    Libraries write pages. The line is printable and has no full stop.

    Args:
        error: of a library.
        limit: the largest number of characters; None for no limit.
    """
    text = str(error).strip()
    if not text:
        return type(error).__name__
    line = text.splitlines()[0][:limit]
    printable = [character if character.isprintable() else "?" for character in line]
    return "".join(printable).rstrip(".")


def escape_controls(text: str) -> str:
    """Shows characters that a terminal would obey as escapes, but for line breaks and tabs.

    What others wrote, in a file's name or in a model's answer, could otherwise move the cursor,
    write over lines, or fill the clipboard.
    """
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
