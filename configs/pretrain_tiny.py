"""Trains the base model that ships as assets/tiny.pth: 1.0 million parameters, byte vocabulary.

    python train.py --config=configs/pretrain_tiny.py --workdir=runs/tiny

With seed 0 it reads 9.8 million tokens in about 50 minutes on two CPU cores. Expect 1.27 bits per
byte on held-out documents of CPython 3.11 (2.00 after a twelfth of the run); the loss curve is
docs/images/tiny-loss.png. Other versions of Python ship slightly different texts.
"""

from ml_collections import ConfigDict


def get_config():
    """Returns the settings: 4 layers of width 128, on CPython's own source and documentation."""
    config = ConfigDict()
    config.mode = "pretrain"
    config.steps = 4800
    config.seed = 0
    config.log_every = 20
    config.save_every = 200
    config.model = ConfigDict(
        {"vocab_size": 257, "num_layers": 4, "width": 128, "head_size": 32}
    )
    config.data = ConfigDict(
        {
            "path": "stdlib,pydoc-topics",
            "held_out": 0.05,
            "batch_size": 8,
            "length": 256,
        }
    )
    config.optimizer = ConfigDict(
        {
            "kind": "muon",
            "learning_rate": 5e-3,
            "final_learning_rate": 0.0,
            "schedule": "wsd",
            "warmup_steps": 20,
            "weight_decay": 0.05,
            "l2wrap": 1e-4,
        }
    )
    config.evaluation = ConfigDict({"every": 400, "windows": 48, "length": 512})
    config.sample = ConfigDict({"prompts": ("def ", "The "), "tokens": 200})
    return config
