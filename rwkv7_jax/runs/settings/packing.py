"""How the rows of a run are cut, and which runs can read rows that several documents share."""

from typing import Literal

from rwkv7_jax.data.choices import Packing

# `config.data.packing`, where "auto" leaves it to the run's mode and data.
PackingChoice = Literal["auto", "stream", "documents", "packed"]

# They train the state that a document begins from.
_STATE_MODES = ("state", "upscaled_state")

# Their losses start each document of a row anew.
PACKED_MODES = ("pretrain", *_STATE_MODES)


def packing_of_answers(mode: str, dynamics: str, implementation: str | None) -> Packing:
    """Returns what packing "auto" is for questions with answers; it is "stream" for other text.

    A state is tuned from where questions begin, as it is used: a row that begins inside of one
    teaches it another place.

    Args:
        mode: `config.mode`.
        dynamics: `config.upscaling.dynamics`.
        implementation: of the recurrence; None for the best one.
    """
    if mode not in _STATE_MODES:
        return "stream"
    has_sequences = mode == "state" or dynamics == "static"
    # jax-triton's kernel reads rows of one sequence.
    return "packed" if has_sequences and implementation != "triton" else "documents"


def check_packing(packing: PackingChoice, mode: str, dynamics: str) -> None:
    """Checks that the run can read rows packed like this.

    Args:
        packing: `config.data.packing`.
        mode: `config.mode`.
        dynamics: `config.upscaling.dynamics`.

    Raises:
        ValueError: several documents would share a row, and the run does not know how.
    """
    if packing != "packed":
        return
    if mode not in PACKED_MODES:
        raise ValueError(
            '`config.data.packing` must be "stream" or "documents" but in modes '
            f'{", ".join(PACKED_MODES)}; got "packed" in mode {mode!r}.'
        )
    if mode == "upscaled_state" and dynamics != "static":
        raise ValueError(
            '`config.upscaling.dynamics` must be "static" where `config.data.packing` is '
            f'"packed"; got {dynamics!r}.'
        )
