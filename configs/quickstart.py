"""Tunes a state of the small base model on text that it has never seen: CPython's code pages.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py:upscaled --workdir=runs/upscaled

Each takes less than a minute on two CPU cores. Expect held-out bits per byte to fall from 2.04 to
1.69 (18 %) with the start state and to 0.93 (55 %) with the upscaled one. On the text that the
model was trained on, the standard library, they rise from 1.25 to 1.35 and 1.76.
config.tuning.anchor and config.tuning.alpha reduce this forgetting.
"""

from ml_collections import ConfigDict


def get_config(arg="state"):
    """Returns the settings to train 16 thousand numbers of a state, or 66 thousand of a memory."""
    if arg not in ("state", "upscaled"):
        raise ValueError(
            f"quickstart: the kind must be state or upscaled; got {arg!r}."
        )
    wide = arg == "upscaled"
    config = ConfigDict()
    config.mode = "upscaled_state" if wide else "state"
    config.init = "assets/tiny.pth"
    config.steps = 40
    config.seed = 0
    config.log_every = 5
    config.data = ConfigDict(
        {"path": "charmaps", "held_out": 0.1, "batch_size": 8, "length": 256}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 0.3 if wide else 1.0,
            "final_learning_rate": 0.01,
            "schedule": "cosine",
            "warmup_steps": 10,
            "clip": None,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict({"decorrelate": "dbp" if wide else "none"})
    config.evaluation = ConfigDict({"every": 0, "windows": 24, "length": 512})
    return config
