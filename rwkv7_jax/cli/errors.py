"""Errors that users can mend, as one sentence."""

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.runs.exit_codes import is_out_of_memory, memory_sentence

_LESS_MEMORY = (
    "use a smaller model, a shorter prompt or text, or lower `--windows`, `--length` or `--show` "
    "where the command has them"
)


def reason(error: Exception) -> str:
    """Formats an error; those of the operating system name their file first.

    Characters that a terminal would obey, as in a file's name, are escaped.
    """
    if is_out_of_memory(error):
        return memory_sentence(error, _LESS_MEMORY)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return escape_controls(f"`{error.filename}`: {error.strerror}.")
    return escape_controls(str(error))
