"""Trains all weights: from scratch by the published recipe, or those of a checkpoint.

    python train.py --config=configs/pretrain.py --workdir=runs/0.1b --config.data.path=corpus.bin
    python train.py --config=configs/pretrain.py:checkpoint --workdir=runs/tuned \
        --config.init=model.pth --config.data.path=corpus.bin

From scratch it is the 0.1B size on tokens in the World vocabulary: learning rate 6e-4 falling to
6e-5, Adam with epsilon 1e-18, weight decay on the matrices only. A checkpoint has its own sizes,
and begins at a hundredth of the rate; neither rate was searched here.
"""

from ml_collections import ConfigDict


def get_config(arg="scratch"):
    """Takes the sizes of RWKV-7 0.1B, or with "checkpoint" those of `config.init`."""
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
    config.tuning = ConfigDict()
    config.evaluation = ConfigDict({"every": 1000, "windows": 64, "length": 512})
    config.sample = ConfigDict()
    return config
