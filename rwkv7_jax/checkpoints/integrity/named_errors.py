"""Errors about a file's content, each one sentence that names the file."""

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

from rwkv7_jax.checks import first_line, prefix_errors
from rwkv7_jax.local_paths import name_in_errors

# Errors that code raises on content of an unexpected form.
_UNEXPECTED = (
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
)


@contextlib.contextmanager
def name_file(path: str | Path, function: str) -> Iterator[None]:
    """Adds the function and the file's path to every error that the file causes in the block.

    * Helpers need not know the function (see `prefix_errors`).
    * Checks of shapes and settings do not know the file, so the path is appended to their messages.
    * Errors without a readable message become a sentence that the file is damaged.
    * Errors of the disk get the path.

    Args:
        path: path of the file or folder that the block reads.
        function: name of the public function.
    """
    with prefix_errors(function), name_in_errors(path):
        try:
            yield
        except (ValueError, TypeError) as error:
            if str(path) in str(error):
                raise
            # Subclasses such as UnicodeDecodeError build their message from other arguments.
            if type(error) not in (ValueError, TypeError):
                raise ValueError(f"`{path}` is damaged: {first_line(error)}.") from None
            error.args = (f"{str(error).rstrip('.')} (in `{path}`).",)
            raise
        except _UNEXPECTED as error:
            raise ValueError(f"`{path}` is damaged: {first_line(error)}.") from None
