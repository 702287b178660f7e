"""Tune the start state of the small base model on a text it has never seen.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
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
    config.data = ConfigDict({"path": "c-headers", "held_out": 0.1, "batch_size": 8, "length": 256})
    config.optimizer = ConfigDict(
        {
            "learning_rate": 2.0,
            "final_learning_rate": 0.1,
            "schedule": "cosine",
            "warmup_steps": 10,
            "clip": None,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict()
    config.evaluation = ConfigDict({"every": 0, "windows": 32, "length": 512})
    config.sample = ConfigDict({"prompts": (), "tokens": 160})
    return config
