"""Errors about a file's content: each is one sentence that names the file."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from rwkv7_jax.checks import first_line, prefix_errors
from rwkv7_jax.local_paths import name_in_errors

# What code raises that meets content of another kind than it expects.
_UNEXPECTED = (
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
)


@contextlib.contextmanager
def name_file(path: str | Path, function: str) -> Iterator[None]:
    """Puts the function and the file's path into every error that the file causes in the block.

    Whatever reads a part of the file need not know the function (see `prefix_errors`). Checks of
    shapes and settings know nothing of files either: their messages get the path at the end. Errors
    that say nothing to a reader become a sentence, and those of a disk that fails get the path.

    Args:
        path: of the file or folder that the block reads.
        function: the public function.
    """
    with prefix_errors(function), name_in_errors(path):
        try:
            yield
        except (ValueError, TypeError) as error:
            if str(path) in str(error):
                raise
            # Subclasses such as UnicodeDecodeError make their message from other arguments.
            if type(error) not in (ValueError, TypeError):
                raise ValueError(f"`{path}` is damaged: {first_line(error)}.") from None
            error.args = (f"{str(error).rstrip('.')} (in `{path}`).",)
            raise
        except _UNEXPECTED as error:
            raise ValueError(f"`{path}` is damaged: {first_line(error)}.") from None
