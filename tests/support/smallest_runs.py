"""Settings of the smallest run of every mode, and the model that they start from."""

from pathlib import Path

from run_programs import MODEL, SMALLEST
from tiny_models import lively

from rwkv7_jax.checkpoints.model_files import save_model
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.settings import Settings, read_settings

STEPS = 5
TASK = {"data.path": "task:mapping", "data.length": 24, "data.batch_size": 2}
STEER = {
    "data.path": "task:steer",
    "test_time.tokens": 6,
    "evaluation.length": 40,
}
DRAWN = STEER | {"test_time.prompts": 2, "test_time.group": 4}
TEST_TIME_METHODS = ("grpo", "expert", "distil", "context")
# By mode, or by method of mode "test_time".
MODES = {
    "pretrain": {"optimizer.weight_decay": 0.1},
    "state": TASK | {"tuning.anchor": 1.0, "tuning.anchor_path": "task:facts-8"},
    "upscaled_state": TASK | {"tuning.decorrelate": "dbp", "upscaling.rows": 4},
    "observer": TASK
    | {"observer.least": 4, "observer.most": 8, "observer.model": {"head_size": 8}},
    "grpo": DRAWN,
    "expert": DRAWN | {"test_time.method": "expert"},
    "distil": STEER | {"test_time.method": "distil", "test_time.keep": "all"},
    "context": TASK | {"test_time.method": "context"},
}


def save_base_model(path: Path, **sizes: int) -> None:
    """Saves a model of one layer."""
    config = RWKV7Config(**(MODEL | sizes))
    save_model(path, lively(config), config)


def mode_settings(mode: str, base_model: Path, **changes) -> Settings:
    """Makes the settings of a mode's smallest run; dots in the changes' names are `__`."""
    flat = {
        **SMALLEST,
        "mode": mode,
        "steps": STEPS,
        "save_every": 2,
        "log_every": 1,
        "optimizer.learning_rate": 0.05,
        "evaluation.every": 2,
        "evaluation.patience": 9,
    }
    flat |= MODES[mode]
    flat |= {name.replace("__", "."): value for name, value in changes.items()}
    if mode != "pretrain":
        flat["init"] = str(base_model)
    if mode in TEST_TIME_METHODS:
        flat["mode"] = "test_time"
        own = {"distil": {"test_time.guide": str(base_model), "test_time.traces": 8}}
        own["context"] = {"test_time.context": __file__}
        flat = own.get(mode, {}) | flat
    nested: dict = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        if group == "model" and "init" in flat:
            continue  # The checkpoint fixes the sizes.
        (nested.setdefault(group, {}) if group else nested)[key] = value
    return read_settings(nested)


def odd_sum(prompt, completion) -> float:
    """A reward that half of all completions earn."""
    del prompt
    return float(sum(completion) % 2)
