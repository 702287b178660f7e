"""Trains an observer: a small model that reads a prompt and proposes the large one's start state.

    python train.py --config=configs/observer.py --workdir=runs/observer --config.init=model.pth \
        --config.data.path=general.jsonl

The teacher stays frozen. The log shows how well it predicts the text after held-out prompts from
zeros (no_state), from its own state (own_state) and from the proposal. For the toy base model, run
it from a clone with

    --config.init=assets/toy-small.pth --config.data.path=task:mapping --config.data.length=32 \
        --config.data.batch_size=32 --config.evaluation.length=32 --config.model.dtype=float32 \
        --config.observer.least=25 --config.observer.most=25 --config.steps=1000
"""

from ml_collections import ConfigDict


def get_config():
    """Trains an observer, by default of one layer and half the teacher's width."""
    config = ConfigDict()
    config.mode = "observer"
    config.init = ""
    config.steps = 2000
    config.seed = 0
    config.save_every = 500
    config.model = ConfigDict({"dtype": "auto"})
    config.data = ConfigDict(
        {"path": "", "held_out": 0.05, "batch_size": 16, "length": 512}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 3e-3,
            "final_learning_rate": 1.5e-4,
            "schedule": "cosine",
            "warmup_steps": 10,
            "clip": 1.0,
            "b2": 0.999,
            "eps": 1e-8,
        }
    )
    config.observer = ConfigDict(
        {
            "variance": 1.0,
            "divergence": 0.5,
            "answers": 1.0,
        }
    )
    config.evaluation = ConfigDict({"every": 500, "windows": 64, "length": 512})
    return config
