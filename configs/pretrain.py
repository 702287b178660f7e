"""Trains a model from scratch by the published recipe.

    python train.py --config=configs/pretrain.py --workdir=runs/0.1b --config.data.path=corpus.bin

The 0.1B size on tokens in the World vocabulary: learning rate 6e-4 falling to 6e-5, Adam with
epsilon 1e-18, weight decay on the matrices only.
"""

from ml_collections import ConfigDict


def get_config():
    """Takes the sizes of RWKV-7 0.1B."""
    config = ConfigDict()
    config.mode = "pretrain"
    config.steps = 100_000
    config.seed = 0
    config.save_every = 1000
    config.model = ConfigDict(
        {
            "vocab_size": 65536,
            "num_layers": 12,
            "width": 768,
            "dtype": "auto",
            "remat": "block",
        }
    )
    config.data = ConfigDict(
        {"path": "", "held_out": 0.01, "batch_size": 16, "length": 512}
    )
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",
            "learning_rate": 6e-4,
            "final_learning_rate": 6e-5,
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
