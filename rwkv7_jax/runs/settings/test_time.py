"""The settings of mode "test_time"."""

import dataclasses
from typing import Literal

from rwkv7_jax.runs.settings.fields import (
    MOST_COUNT,
    MOST_RATE,
    MOST_WEIGHT,
    choice,
    number,
    place,
)

SAMPLING_DTYPES = ("float32", "bfloat16")

# Default number of completions per prompt for a majority vote.
_VOTES = 8

TestTimeMethod = Literal["grpo", "distil", "expert", "context"]


def is_trace_file(guide: str | None) -> bool:
    """Returns whether `config.test_time.guide` names a file of traces, not a model."""
    return guide is not None and guide.endswith(".jsonl")


@dataclasses.dataclass(frozen=True)
class TestTimeSettings:
    """The settings of mode "test_time".

    Attributes:
        method: "grpo" (from rewards), "distil" (from a guide's traces), "expert" (from the model's
            own verified answers) or "context" (compresses a long prompt into a state).
        guide: checkpoint of the larger model that writes traces, or a .jsonl file of traces.
        context: file of the prompt that "context" distils.
        verifier: how the answer is extracted from a completion and compared with the reference:
            "exact" (the whole completion), "hash_number" (the number after "####"), "last_number"
            or "letter" (of a choice). Or "module:function", a reward function of the ids of prompt
            and completion.
        keep: "verified" traces, those with the "majority" answer, or "all".
        substitute: (old, new), a replacement in the guide's prompts, so that it sees more than the
            model.
        hint: text before the guide's prompts.
        prompts: prompts per step.
        group: the model's completions per prompt.
        tokens: most tokens of a completion.
        temperature: sampling temperature.
        kl: weight of KL(tuned || start) on sampled tokens; the start is the state of
            `config.start`, or the untuned model without one.
        baseline: for "grpo", subtracted from a reward: the "mean" of its group, or the mean of the
            other completions ("leave_one_out").
        scale: for "grpo", "std" divides by the group's standard deviation, "none" does not.
        average: for "grpo", how the loss averages: by "token", by "row" or by a "constant" length.
        redraws: for "grpo", most times that completions of a uniform group are sampled again.
        updates: for "grpo", updates with the completions of each step (num_iterations, mu). From
            the second one on, the loss uses the clipped ratio of probabilities.
        epsilon_low, epsilon_high: largest distances of that ratio below and above 1 (clip-higher of
            DAPO: 0.2 and 0.28).
        sampling_dtype: for "grpo", dtype of the activations in sampling, such as "bfloat16"; by
            default the model's.
        importance_cap: for "grpo", largest weight of a token in truncated importance sampling: the
            ratio of its probability in training to that in sampling. By default no such weights.
        stop: stop sequences of a completion, such as ("Question:",). The judged completion excludes
            them; the training target includes them, so the model learns to stop.
        traces: number of prompts that the guide completes.
        chains: the guide's completions per prompt, of which `keep` selects some; by default 8 for
            "majority" and otherwise 1.
        at_once: prompts per batch of the guide, with `chains` completions each.
        vote_margin: fraction of a prompt's completions by which the "majority" answer must lead.
    """

    method: TestTimeMethod = "grpo"
    guide: str | None = place(None)
    context: str | None = place(None)
    verifier: str = "exact"
    keep: Literal["verified", "majority", "all"] = "verified"
    substitute: tuple[str, ...] = ()
    hint: str = ""
    prompts: int = number(8, 1, MOST_COUNT)
    group: int = number(8, 1, MOST_COUNT)
    tokens: int = number(64, 1, MOST_COUNT)
    temperature: float = number(1.0, 0, MOST_RATE)
    kl: float = number(0.0, 0, MOST_WEIGHT)
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["std", "none"] = "std"
    average: Literal["token", "row", "constant"] = "token"
    redraws: int = number(0, 0, MOST_COUNT)
    updates: int = number(1, 1, MOST_COUNT)
    epsilon_low: float = number(0.2, 0, 1)
    epsilon_high: float = number(0.2, 0, MOST_RATE)
    sampling_dtype: str | None = choice(None, SAMPLING_DTYPES, absent="")
    importance_cap: float | None = number(
        None, 0, MOST_WEIGHT, above=True, note=", or None for no weights"
    )
    stop: tuple[str, ...] = ()
    traces: int = number(256, 1, MOST_COUNT)
    chains: int | None = number(
        None, 1, MOST_COUNT, note=', or None for 8 with "majority" and otherwise 1'
    )
    at_once: int = number(64, 1, MOST_COUNT)
    vote_margin: float = number(0.25, 0, 1)

    @property
    def chains_of_prompt(self) -> int:
        """The number of the guide's completions per prompt."""
        if self.chains is not None:
            return self.chains
        return _VOTES if self.keep == "majority" else 1

    def __post_init__(self):
        """Checks the stop strings and the replacement.

        Raises:
            ValueError: a stop string is empty, or `substitute` is not two texts.
        """
        if "" in self.stop:
            raise ValueError(
                "`config.test_time.stop` must hold only non-empty strings; got ''."
            )
        if len(self.substitute) not in (0, 2):
            raise ValueError(
                "`config.test_time.substitute` must be two texts, the old and the new one; "
                f"got {self.substitute}."
            )
