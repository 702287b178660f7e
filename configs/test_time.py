"""Tunes a frozen model's start state at test time from rewards, a larger model or a long prompt.

    python train.py --config=configs/test_time.py --workdir=runs/steered \
        --config.init=model.pth --config.data.path=questions.jsonl

* Questions are lines of {"prompt": ..., "answer": ...}, whose prompts are used verbatim, or chats:
  {"question": ..., "answer": ...} as in GSM8K, or "messages" and an "answer".
* A fraction of them (config.data.held_out), or another file (config.data.evaluation), is held out
  for evaluation.
* A completion with the correct answer has reward 1. config.test_time.verifier tells where the
  answer is: "exact" (the whole completion), "hash_number" (after "####"), "last_number" or
  "letter". "module:function" names another reward, a function of the ids of prompt and completion.
* config.start is the file of a state to start from, or a text that the model reads as a prompt.

Methods (config.test_time.method):

    grpo     policy gradients on the model's own completions, by their rewards
    expert   imitation of its own completions that earn a reward
    distil   imitation of verified traces of a larger model, config.test_time.guide, with
             config.test_time.chains traces for each prompt; if the guide is a .jsonl file of
             traces, these are imitated as they are
    context  turns config.test_time.context, a long prompt, into a state; data is any text

For the toy base, run it from a clone. This learns a hidden instruction from rewards alone in 60
steps:

    --config.init=assets/toy-small.pth --config.data.path=task:steer --config.test_time.tokens=6 \
        --config.model.dtype=float32 --config.steps=60 --config.evaluation.windows=128

To learn it from the larger toy model, which is given the instruction, add

    --config.test_time.method=distil --config.test_time.guide=assets/toy-large.pth \
        --config.test_time.substitute="('?', 'R')" --config.optimizer.learning_rate=0.3
"""

from ml_collections import ConfigDict


def get_config():
    """Returns the settings for GRPO with eight completions of eight prompts per step."""
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
    config.test_time = ConfigDict(
        {"method": "grpo", "prompts": 8, "group": 8, "tokens": 64}
    )
    config.evaluation = ConfigDict({"every": 20, "windows": 64, "length": 512})
    return config
