"""The toy base models that ship as assets/toy-*.pth: four tasks over 32 symbols, learnt together.

python train.py --config=configs/pretrain_toy.py:small --workdir=runs/toy-small
rwkv7 convert runs/toy-small/model.pth assets/toy-small.pth --dtype bfloat16
"""

from ml_collections import ConfigDict

SIZES = {
    "small": {"num_layers": 2, "width": 64, "head_size": 32},
    "small16": {"num_layers": 2, "width": 64, "head_size": 16},
    "large": {"num_layers": 3, "width": 96, "head_size": 32},
}


def get_config(arg="small"):
    """The model of a size of `SIZES`, in the byte vocabulary."""
    if arg not in SIZES:
        raise ValueError(f"pretrain_toy: the size must be one of {', '.join(SIZES)}; got {arg!r}.")
    size = SIZES[arg]
    ranks = {"decay_rank": 16, "icl_rank": 16, "value_rank": 16, "gate_rank": 32}
    config = ConfigDict()
    config.mode = "pretrain"
    config.steps = 1200 if arg == "large" else 1600
    config.seed = 0
    config.log_every = 50
    config.model = ConfigDict({"vocab_size": 257, "ffn_width": 3 * size["width"]} | size | ranks)
    config.data = ConfigDict({"path": "task:mixture", "batch_size": 32, "length": 32})
    config.optimizer = ConfigDict(
        {
            "kind": "muon",
            "learning_rate": 5e-3,
            "final_learning_rate": 1e-4,
            "schedule": "wsd",
            "warmup_steps": 40,
            "weight_decay": 0.01,
            "clip": 1.0,
            "b2": 0.98,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict()
    parts = "task:dictionary,task:mapping,task:modular,task:sequence"
    config.evaluation = ConfigDict({"every": 400, "windows": 128, "length": 32, "retention": parts})
    config.sample = ConfigDict()
    return config
