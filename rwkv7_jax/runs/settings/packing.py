"""Which runs can read rows that several documents share."""

from collections.abc import Mapping

from rwkv7_jax.data.choices import Packing

# Their losses start each document of a row anew.
PACKED_MODES = ("pretrain", "state", "upscaled_state")


def check_packing(
    packing: Packing, mode: str, states: Mapping[str, str] | str | None, dynamics: str
) -> None:
    """Checks that the run can read rows packed like this.

    Args:
        packing: `config.data.packing`.
        mode: `config.mode`.
        states: `config.tuning.states`, a list of several; None for one.
        dynamics: `config.upscaling.dynamics`.

    Raises:
        ValueError: several documents would share a row, and the run does not know how.
    """
    if packing != "packed":
        return
    if mode not in PACKED_MODES or states is not None:
        run = f"mode {mode!r}" if states is None else "several states"
        raise ValueError(
            '`config.data.packing` must be "stream" or "documents" but in modes '
            f'{", ".join(PACKED_MODES)} with one state; got "packed" with {run}.'
        )
    if mode == "upscaled_state" and dynamics != "static":
        raise ValueError(
            '`config.upscaling.dynamics` must be "static" where `config.data.packing` is '
            f'"packed"; got {dynamics!r}.'
        )
