"""Trains a base model on English from Debian: on one GPU, or a smaller one on two CPU cores.

    python -m benchmarks.debian_text runs/debian.jsonl
    python train.py --config=configs/pretrain_english.py --workdir=runs/english

On a GPU: 24 million parameters, bytes. A step reads 64 rows of 1,024 bytes; 4,000 steps are one
epoch of 270 MB. The learning rate decays to a fifteenth by the last step, so set `--config.steps`
to the time that you have.

    python -m benchmarks.small_vocabulary runs/debian.jsonl runs/english.txt --size 4096
    python train.py --config=configs/pretrain_english.py:cpu --workdir=runs/english

On a CPU: 5.6 million parameters and a vocabulary of 4,096 ids, 2.9 bytes each. The run reads 17 MB
in less than an hour.
"""

from ml_collections import ConfigDict


def get_config(machine="gpu"):
    """Returns the settings for 12 layers of width 384, or on a "cpu" for 4 layers of width 256."""
    if machine not in ("gpu", "cpu"):
        raise ValueError(
            f"pretrain_english: the machine must be gpu or cpu; got {machine!r}."
        )
    config = ConfigDict()
    config.mode = "pretrain"
    config.steps = 2500
    config.seed = 0
    config.log_every = 20
    config.save_every = 500
    config.keep = 1
    config.model = ConfigDict(
        {
            "vocab_size": 257,
            "num_layers": 12,
            "width": 384,
            "head_size": 64,
            "dtype": "auto",
        }
    )
    config.data = ConfigDict(
        {
            "path": "runs/debian.jsonl",
            "held_out": 0.05,
            "batch_size": 64,
            "length": 1024,
        }
    )
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",
            "learning_rate": 1.5e-3,
            "final_learning_rate": 1e-4,
            "schedule": "cosine",
            "warmup_steps": 100,
            "weight_decay": 0.1,
            "l2wrap": 1e-4,
        }
    )
    config.evaluation = ConfigDict({"every": 500, "windows": 512, "length": 1024})
    config.sample = ConfigDict({"prompts": ("The ", "Question: "), "tokens": 200})
    if machine == "cpu":
        shrink(config)
    return config


def shrink(config):
    """Changes the settings to those of the smaller model."""
    config.steps = 1400
    config.model.update({"vocab_size": 4096, "num_layers": 4, "width": 256})
    config.data.update({"batch_size": 16, "length": 256})
    config.data.vocabulary = "runs/english.txt"
    # The optimizer of configs/pretrain_tiny.py, which trains a model of this kind.
    config.optimizer.update(
        {
            "kind": "muon",
            "learning_rate": 5e-3,
            "final_learning_rate": 0.0,
            "schedule": "wsd",
            "warmup_steps": 20,
            "weight_decay": 0.05,
        }
    )
    config.evaluation.update({"windows": 64, "length": 512})
    config.sample.tokens = 100
