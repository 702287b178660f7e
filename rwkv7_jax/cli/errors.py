"""Formats user errors as one sentence."""

from rwkv7_jax.checks import escape_controls
from rwkv7_jax.runs.exit_codes import is_out_of_memory, memory_sentence

_LESS_MEMORY = (
    "use a smaller model, a shorter prompt or text, or lower values of the command's `--windows`, "
    "`--length` or `--show`"
)


def reason(error: Exception) -> str:
    """Formats an error; an operating system error begins with its file.

    Control characters, for instance in a file name, are escaped.
    """
    if is_out_of_memory(error):
        return memory_sentence(error, _LESS_MEMORY)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return escape_controls(f"`{error.filename}`: {error.strerror}.")
    return escape_controls(str(error))
