"""The message for a step that does not fit into memory: an estimate, and what to change."""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.exit_codes import OutOfMemory, is_out_of_memory
from rwkv7_jax.runs.modes.base import TrainingMode
from rwkv7_jax.training.costs import Memory

_MIB = 2**20


@contextlib.contextmanager
def explain_out_of_memory(mode: TrainingMode, mesh: Mesh | None) -> Iterator[None]:
    """Turns an out-of-memory error of any platform into one that says what to change.

    Args:
        mode: of the run.
        mesh: the devices that share a step; None for one device.

    Raises:
        OutOfMemory: the block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(_advice(mode, mesh, error)) from error


def _advice(mode: TrainingMode, mesh: Mesh | None, error: Exception) -> str:
    settings = mode.settings
    memory = mode.memory_estimate(mesh)
    if memory is None:
        estimate = f"there is no estimate for a step of mode {settings.mode}"
    else:
        estimate = (
            f"a step needs about {memory.total / _MIB:,.0f} MiB on each device, most of it "
            f"{_largest_part(memory)}"
        )
    changes = [
        f"lower `config.data.batch_size` ({settings.data.batch_size})",
        f"lower `config.data.length` ({settings.data.length})",
        f"raise `config.optimizer.accumulate` ({settings.optimizer.accumulate})",
    ]
    if mode.model.config.remat != "block":
        changes.append('set `config.model.remat` to "block"')
    if settings.mode == "test_time":
        changes.append(
            "lower `config.test_time.prompts`, `group`, `tokens` or `at_once`"
        )
    changes.append(
        f"use a mesh of more devices (now {1 if mesh is None else mesh.size})"
    )
    # The first line says how much memory was requested.
    return f"out of memory: {estimate}; {', '.join(changes)} ({first_line(error)})"


def _largest_part(memory: Memory) -> str:
    parts = {
        "parameters": memory.parameters,
        "optimizer moments": memory.moments,
        "gradients": memory.gradients,
        "activations": memory.activations,
    }
    name = max(parts, key=lambda part: parts[part])
    return f"{name} ({parts[name] / _MIB:,.0f} MiB)"
