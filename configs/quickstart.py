"""Tune the start state of the small base model on a text it has never seen.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The text: CPython's tables of code pages. About a minute on two CPU cores. Expect held-out bits per
byte to fall from 2.03 to 1.58 (22 %), and those of the model's own kind of text, the standard
library, to rise from 1.25 to 1.37: that is the price.
"""

from ml_collections import ConfigDict


def get_config():
    """A state of 16 thousand numbers; 1.0 million weights stay as they are."""
    config = ConfigDict()
    config.mode = "state"
    config.init = "runs/base"
    config.steps = 80
    config.seed = 0
    config.log_every = 5
    config.model = ConfigDict()
    config.data = ConfigDict({"path": "charmaps", "held_out": 0.1, "batch_size": 8, "length": 256})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1.0,
            "final_learning_rate": 0.01,
            "schedule": "cosine",
            "warmup_steps": 10,
            "clip": None,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict()
    config.evaluation = ConfigDict({"every": 0, "windows": 48, "length": 512})
    config.sample = ConfigDict({"prompts": ("decoding",), "tokens": 120})
    return config
