"""Tunes the start state of a frozen model on your text.

    python train.py --config=configs/state_tuning.py --workdir=runs/poet \
        --config.init=model.pth --config.data.path=poems.jsonl

The run searches for the learning rate, because no rate suits every model. Published rates lie
between 1e-5 and 1, and few of them were measured: 3e-4 was the best of four on a model of 0.1
billion parameters (rwkv-metal 0.4.0), 0.3 to 3 on models of a million and less. The search ends
at 1. It takes a tenth of the run, or twelve steps if that is more, tries nine rates in parallel and
compares their held-out losses; the report has the curve. --config.optimizer.learning_rate=0.3 sets
a rate instead.

If the model's other skills matter, name a text that it must not forget, and keep the state close to
the base model there: --config.evaluation.retention=general.jsonl --config.tuning.anchor=1.0
--config.tuning.anchor_path=general.jsonl

To tune several states in one run, one per file, replace data.path by --config.tuning.states=folder.
"""

from ml_collections import ConfigDict


def get_config():
    """Returns the settings for a checkpoint of any size."""
    config = ConfigDict()
    config.mode = "state"
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
    config.evaluation = ConfigDict({"every": 100, "windows": 32, "length": 512})
    return config
