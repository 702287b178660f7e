"""What a run's steps cost, known before anything compiles. Level 7."""

from .config import RWKV7Config
from .costs import flops_per_token, training_memory
from .settings import Settings

# Modes whose steps are one pass of one model, and what their gradients are of.
_TRAINED = {"pretrain": "weights", "state": "state", "upscaled_state": "state"}


def step_flops(settings: Settings, config: RWKV7Config) -> float | None:
    """Operations of a step per token; None for modes whose steps read more than they learn."""
    trained = _TRAINED.get(settings.mode)
    if trained is None or settings.tuning.anchor:
        return None
    flops = flops_per_token(config)
    return flops.training if trained == "weights" else flops.state


def step_rows(settings: Settings) -> int:
    """Rows that a step computes at once."""
    asked = settings.test_time
    if settings.mode == "test_time" and asked.method in ("grpo", "expert"):
        return asked.prompts * asked.group
    return settings.data.batch_size // settings.optimizer.accumulate


def memory_line(settings: Settings, config: RWKV7Config, held: int, *, devices: int = 1) -> str:
    """One step's memory on one device in words: what is held, and in all where one can tell.

    Args:
        settings: of the run.
        config: of its model.
        held: bytes of what is trained and its moments.
        devices: over which a step's rows are spread.
    """
    said = f"{held / 2**20:,.1f} MiB for what is trained and its moments"
    trained = _TRAINED.get(settings.mode)
    if trained is None:
        return said
    need = training_memory(
        config,
        batch=settings.data.batch_size // devices,
        length=settings.data.length,
        trained=trained,
        accumulate=settings.optimizer.accumulate,
    )
    return f"{said}, about {need.total / 2**20:,.0f} MiB in all"
