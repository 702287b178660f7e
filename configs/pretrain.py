"""Trains all weights, from scratch by the published recipe or from a checkpoint.

    python train.py --config=configs/pretrain.py --workdir=runs/0.1b --config.data.path=corpus.bin
    python train.py --config=configs/pretrain.py:checkpoint --workdir=runs/tuned \
        --config.init=model.pth --config.data.path=corpus.bin

From scratch, the model has the 0.1B size and the World vocabulary. The learning rate decays from
6e-4 to 6e-5; Adam has epsilon 1e-18; weight decay applies only to the matrices. A checkpoint keeps
its own sizes and starts at a hundredth of the rate. Neither rate was searched here.
"""

from ml_collections import ConfigDict


def get_config(arg="scratch"):
    """Returns the settings for RWKV-7 0.1B or, with "checkpoint", for `config.init`."""
    if arg not in ("scratch", "checkpoint"):
        raise ValueError(
            f"pretrain: the weights must be from scratch or checkpoint; got {arg!r}."
        )
    from_checkpoint = arg == "checkpoint"
    rate = 6e-6 if from_checkpoint else 6e-4
    config = ConfigDict()
    config.mode = "pretrain"
    config.steps = 100_000
    config.seed = 0
    config.save_every = 1000
    config.model = ConfigDict({"dtype": "auto", "remat": "block"})
    if from_checkpoint:
        config.init = ""
    else:
        config.model.update({"vocab_size": 65536, "num_layers": 12, "width": 768})
    config.data = ConfigDict(
        {"path": "", "held_out": 0.01, "batch_size": 16, "length": 512}
    )
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",
            "learning_rate": rate,
            "final_learning_rate": rate / 10,
            "schedule": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.1,
            "l2wrap": 1e-4,
        }
    )
    config.evaluation = ConfigDict({"every": 1000, "windows": 64, "length": 512})
    return config
