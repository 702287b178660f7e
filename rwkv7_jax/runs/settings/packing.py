"""How documents are packed into the rows of a run, and which runs can read packed rows."""

from typing import Literal

from rwkv7_jax.data.choices import Packing

# `config.data.packing`; "auto" depends on the run's mode and data.
PackingChoice = Literal["auto", "stream", "documents", "packed"]

# The modes that train the state from which a document begins.
_STATE_MODES = ("state", "upscaled_state")

# The modes whose losses start each document of a row from the start state.
PACKED_MODES = ("pretrain", *_STATE_MODES)


def packing_of_answers(mode: str, dynamics: str, implementation: str | None) -> Packing:
    """Returns the packing that "auto" stands for with questions; it is "stream" for other text.

    A tuned state is used at the beginning of a question, so its training rows must begin there,
    too, not inside a question.

    Args:
        mode: `config.mode`.
        dynamics: `config.upscaling.dynamics`.
        implementation: implementation of the recurrence; None for the best one.
    """
    if mode not in _STATE_MODES:
        return "stream"
    has_sequences = mode == "state" or dynamics == "static"
    # The Triton kernel supports only one sequence per row.
    return "packed" if has_sequences and implementation != "triton" else "documents"


def check_packing(packing: PackingChoice, mode: str, dynamics: str) -> None:
    """Checks that the run supports the packing.

    Args:
        packing: `config.data.packing`.
        mode: `config.mode`.
        dynamics: `config.upscaling.dynamics`.

    Raises:
        ValueError: several documents would share a row, which the run does not support.
    """
    if packing != "packed":
        return
    if mode not in PACKED_MODES:
        raise ValueError(
            '`config.data.packing` must be "stream" or "documents" outside modes '
            f'{", ".join(PACKED_MODES)}; got "packed" in mode {mode!r}.'
        )
    if mode == "upscaled_state" and dynamics != "static":
        raise ValueError(
            '`config.upscaling.dynamics` must be "static" if `config.data.packing` is '
            f'"packed"; got {dynamics!r}.'
        )
