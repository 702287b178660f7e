"""Tunes the start state of a frozen model on your text.

    python train.py --config=configs/state_tuning.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

Adam at a rate far above the usual, falling from 1 to 0.01 by a cosine: smaller rates look as if
state tuning did not work. Where the model's other skills matter, take a tenth of it and an anchor
on general text: --config.tuning.anchor=1.0 --config.tuning.anchor_path=general.jsonl
"""

from ml_collections import ConfigDict


def get_config():
    """Follows the recipe for published checkpoints."""
    config = ConfigDict()
    config.mode = "state"
    config.init = ""
    config.steps = 400
    config.seed = 0
    config.save_every = 100
    config.model = ConfigDict({"dtype": "bfloat16", "remat": "block"})
    config.data = ConfigDict(
        {"path": "", "held_out": 0.05, "batch_size": 8, "length": 512}
    )
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
    config.tuning = ConfigDict(
        {"leaves": "wkv", "anchor": 0.0, "anchor_path": "", "alpha": 1.0}
    )
    config.evaluation = ConfigDict(
        {"every": 100, "windows": 32, "length": 512, "retention": ""}
    )
    config.sample = ConfigDict()
    return config
