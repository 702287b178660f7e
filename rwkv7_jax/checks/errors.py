"""The name of the public function in the messages of argument checks."""

import contextlib
import contextvars
from collections.abc import Iterator

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
