"""The toy base models that ship as assets/toy-*.pth: four tasks over 32 symbols, learnt together.

    python train.py --config=configs/pretrain_toy.py:small --workdir=runs/toy-small
    rwkv7 convert runs/toy-small/model.pth assets/toy-small.pth --dtype bfloat16

A quarter of each batch looks up keys in context (dictionary), a quarter applies a random function
(mapping), the rest calculates (modular) and copies, reverses or advances sequences, of which four
in ten do not say which (sequence: hence its ceiling below 1). Accuracies on 256 held-out rows of
the bfloat16 files, seed 0, and the seconds that train.py took on two CPU cores which other
programs kept busy as well (2, 4 and 3 programs to a core); idle ones are faster.

    size     parameters  steps  seconds  dictionary  mapping  modular  sequence
    small       136 k     1600      173        .977     .957    1.000      .931
    small16     136 k     1600      370        .976     .953    1.000      .962
    large       375 k     1200      417        .932     .963     .998      .979

Muon is quick: 1000 steps of it reach what 1600 of Adam do (kind "adamw", rate 2e-3 falling in a
line, 100 steps of warm-up: .965 .972 1.000 .893). Start states tune more easily on that model,
though: of 128 facts, 150 steps of Adam at a constant rate store 77 and 79 % (rates 0.3 and 1),
against 64 and 74 % on the one shipped; one seed.
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
    config.steps = 2400
    config.seed = 0
    config.log_every = 50
    config.model = ConfigDict({"vocab_size": 257, "ffn_width": 3 * size["width"]} | size | ranks)
    config.data = ConfigDict({"path": "task:mixture", "batch_size": 32, "length": 32})
    config.optimizer = ConfigDict(
        {
            "kind": "adamw",
            "learning_rate": 2e-3,
            "final_learning_rate": 4e-5,
            "schedule": "linear",
            "warmup_steps": 100,
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
