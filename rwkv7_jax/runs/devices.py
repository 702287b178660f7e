"""Which devices a program uses: JAX may not reach one, or may silently use the CPU instead."""

import jax

from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.exit_codes import InUse

# Part of libtpu's message if another process holds the TPU: "The TPU is already in use by ...".
_IN_USE = "already in use"

_WRONG_PLATFORM = "`JAX_PLATFORMS` must name a platform of this machine; got {!r} ({})."


def use_cpu() -> None:
    """Keeps this process off the accelerator, which a run may be using.

    Without it, a command that only reads files would allocate most of a GPU's memory, or hold the
    TPU. It must be called before any use of a device.
    """
    jax.config.update("jax_platforms", "cpu")


def check_devices() -> None:
    """Starts JAX's backend, and checks that it is the one that the user expects.

    Raises:
        InUse: another process holds the TPU. Unless `JAX_PLATFORMS` is set, JAX would run on the
            CPU.
        ValueError: `JAX_PLATFORMS` names a platform that this machine does not have.
    """
    asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        reason = first_line(error)
        _check_not_in_use(reason)
        raise ValueError(_WRONG_PLATFORM.format(asked, reason)) from None
    except AssertionError:
        # JAX skips CUDA on machines without a GPU, and then finds no platform at all.
        raise ValueError(_WRONG_PLATFORM.format(asked, "no GPU was found")) from None
    if platform == "cpu" and not asked:
        _check_not_in_use(_reason_without_tpu())


def _check_not_in_use(reason: str) -> None:
    """Raises if JAX's message means that another process holds the TPU."""
    if _IN_USE in reason:
        raise InUse(
            f"the TPU is held by another process ({reason}); wait for it or end it, or set "
            "JAX_PLATFORMS=cpu to use the CPU."
        )


def _reason_without_tpu() -> str:
    """Returns JAX's reason for using no TPU."""
    try:
        jax.devices("tpu")
    except RuntimeError as error:
        return first_line(error)
    return ""
