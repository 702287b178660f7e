"""Trains a byte-level base model of 24 million parameters on English from Debian, on one GPU.

    python -m benchmarks.debian_text runs/debian.jsonl
    python train.py --config=configs/pretrain_english.py --workdir=runs/english

A step reads 64 rows of 1,024 bytes; 4,000 steps are one epoch of 270 MB. The learning rate decays
to a fifteenth by the last step, so set `--config.steps` to the time that you have.
"""

from ml_collections import ConfigDict


def get_config():
    """Returns the settings for 12 layers of width 384."""
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
    return config
