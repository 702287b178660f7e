"""Compares a model's start states on held-out text.

    python eval.py --config=configs/eval.py --config.init=model.pth --config.state=poet.pth \
        --config.data.path=poems.jsonl

For the accuracy on the questions of a file, replace the data by

        --config.questions=test.jsonl --config.test_time.verifier=last_number

It prints one row per state. With `--config.workdir` it also draws plots.
"""

from ml_collections import ConfigDict


def get_config():
    """Compares the base, the tuned state, and the base after a prompt of 1,024 tokens."""
    config = ConfigDict()
    config.init = ""
    config.state = ""
    config.workdir = ""
    config.data = ConfigDict({"path": "", "held_out": 0.05})
    config.evaluation = ConfigDict(
        {"windows": 24, "length": 512, "prompt_tokens": (1024,)}
    )
    return config
