"""Tunes an upscaled state of a frozen model on your text, a memory read through kernel features.

    python train.py --config=configs/upscaled_state.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

It has four times the numbers of a start state, does not decay, and is shared by all rows of a
batch. The features are calibrated on the text. config.tuning.decorrelate chooses how they are
decorrelated:

* "dbp": during tuning.
* "whiten": once, before tuning. It costs nothing per step, but the model forgets more.
* "none": the kernel step of the paper, which hardly learns.

The run searches for the learning rate, as in configs/state_tuning.py.
"""

from ml_collections import ConfigDict


def get_config():
    """Returns the settings for a checkpoint of any size."""
    config = ConfigDict()
    config.mode = "upscaled_state"
    config.init = ""
    config.steps = 400
    config.seed = 0
    config.save_every = 100
    config.model = ConfigDict({"dtype": "auto", "remat": "block"})
    config.data = ConfigDict(
        {"path": "", "held_out": 0.05, "batch_size": 8, "length": 512}
    )
    config.optimizer = ConfigDict(
        {
            "schedule": "cosine",
            "warmup_steps": 10,
            "clip": None,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict({"decorrelate": "dbp"})
    config.evaluation = ConfigDict({"every": 100, "windows": 32, "length": 512})
    return config
