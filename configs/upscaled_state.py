"""Tunes an upscaled state of a frozen model on your text: a memory read through kernel features.

    python train.py --config=configs/upscaled_state.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

Four times the numbers of a start state, read without fading and shared by all rows of a batch. The
features are taken from the text and decorrelated while tuning (config.tuning.decorrelate = "dbp");
"whiten" does that once, before tuning, which costs nothing per step and makes the model forget more
of what it knew; "none" is the kernel step of the paper, which hardly learns. The learning rate is
found, as in configs/state_tuning.py.
"""

from ml_collections import ConfigDict


def get_config():
    """Gives the settings for a checkpoint of any size."""
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
    config.tuning = ConfigDict(
        {"decorrelate": "dbp", "anchor": 0.0, "anchor_path": "", "alpha": 1.0}
    )
    config.upscaling = ConfigDict({"size": 0, "dynamics": "static"})
    config.decorrelation = ConfigDict()
    config.evaluation = ConfigDict(
        {"every": 100, "windows": 32, "length": 512, "retention": ""}
    )
    config.sample = ConfigDict()
    return config
