"""Compares a model's start states on held-out text.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

or, for the share of right answers to the questions of a file, with these in place of the data

        --config.questions=test.jsonl --config.test_time.verifier=last_number

Prints one row a state; `--config.workdir` also gets the pictures.
"""

from ml_collections import ConfigDict


def get_config():
    """Compares the base, the tuned state, and the base after a prompt of 1,024 tokens."""
    config = ConfigDict()
    config.init = ""
    config.state = ""
    config.workdir = ""
    config.model = ConfigDict()
    config.data = ConfigDict({"path": "", "held_out": 0.05})
    config.optimizer = ConfigDict()
    config.tuning = ConfigDict()
    config.evaluation = ConfigDict(
        {"windows": 24, "length": 512, "prompt_tokens": (1024,), "retention": ""}
    )
    config.sample = ConfigDict()
    return config
