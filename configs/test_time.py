"""Tunes the start state of a frozen model at test time: rewards, a larger model's traces, a prompt.

    python train.py --config=configs/test_time.py --workdir=runs/steered \
        --config.init=model.pth --config.data.path=questions.jsonl

Questions are lines of {"prompt": ..., "answer": ...}, read as they stand, or chats as tuning reads
them: {"question": ..., "answer": ...} as in GSM8K, or "messages" and an "answer". A completion that
gives the answer earns 1.
A share of them (config.data.held_out) is measured and not trained on, or all of another file,
config.data.evaluation.
config.test_time.verifier says where the answer is: "exact" (all of the completion), "hash_number"
(after "####"), "last_number" or "letter". Another reward is a function of the ids of prompt and
completion, named as "module:function". config.start is the file of a state to go on from, or a text
that the model reads as a prompt. Methods (config.test_time.method):

    grpo     the model's own completions, by what they earn
    expert   the same, imitating those that earn something
    distil   config.test_time.guide, a larger model, writes; verified traces are imitated, of
             config.test_time.chains for each prompt (a .jsonl file of traces in its place is
             imitated as it is)
    context  config.test_time.context, a long prompt, becomes a state; data is any text

On the toy base, from a clone: a hidden instruction, learnt from rewards alone in 60 steps, with

    --config.init=assets/toy-small.pth --config.data.path=task:steer --config.test_time.tokens=6 \
        --config.model.dtype=float32 --config.steps=60 --config.evaluation.windows=128

or from the larger toy model, which is told what to do, with these as well

    --config.test_time.method=distil --config.test_time.guide=assets/toy-large.pth \
        --config.test_time.substitute="('?', 'R')" --config.optimizer.learning_rate=0.3
"""

from ml_collections import ConfigDict


def get_config():
    """Tunes by group-relative policy gradients, eight completions of eight prompts a step."""
    config = ConfigDict()
    config.mode = "test_time"
    config.init = ""
    config.steps = 100
    config.seed = 0
    config.save_every = 50
    config.model = ConfigDict({"dtype": "auto"})
    config.data = ConfigDict(
        {"path": "", "held_out": 0.1, "batch_size": 32, "length": 512}
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 0.1,
            "final_learning_rate": 0.01,
            "schedule": "constant",
            "warmup_steps": 0,
            "clip": None,
            "eps": 1e-8,
        }
    )
    config.tuning = ConfigDict()
    config.test_time = ConfigDict(
        {
            "method": "grpo",
            "guide": "",
            "context": "",
            "verifier": "exact",
            "keep": "verified",
            "substitute": (),
            "hint": "",
            "prompts": 8,
            "group": 8,
            "tokens": 64,
            "temperature": 1.0,
            "kl": 0.0,
            "baseline": "mean",
            "scale": "std",
            "average": "token",
            "redraws": 0,
            "traces": 256,
            "at_once": 64,
            "vote_margin": 0.25,
        }
    )
    config.evaluation = ConfigDict(
        {"every": 20, "windows": 64, "length": 512, "retention": ""}
    )
    config.sample = ConfigDict()
    return config
