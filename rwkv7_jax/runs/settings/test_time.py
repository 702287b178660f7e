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

# Completions of a prompt that vote where no other number is set.
_VOTES = 8

TestTimeMethod = Literal["grpo", "distil", "expert", "context"]


@dataclasses.dataclass(frozen=True)
class TestTimeSettings:
    """The settings of mode "test_time".

    Attributes:
        method: "grpo" (rewards alone), "distil" (a guide's traces), "expert" (the model's own
            verified answers) or "context" (a long prompt becomes a state).
        guide: checkpoint of the larger model that writes traces, or a .jsonl file of traces.
        context: file of the prompt that "context" distils.
        verifier: which answer a completion gives, to be compared with the known one: "exact" (all
            of it), "hash_number" (the number after "####"), "last_number" or "letter" (of a
            choice); or "module:function", called with the ids of prompt and completion and giving a
            reward.
        keep: "verified" traces, the "majority" answer's, or "all".
        substitute: (what, with what) in the guide's prompts, so that it sees more than the model.
        hint: text before the guide's prompts.
        prompts: prompts a step.
        group: completions of each that the model itself writes.
        tokens: of a completion at most.
        temperature: of sampling.
        kl: weight of KL(tuned || start) on what was drawn; the start is the state of
            `config.start`, without one the untuned model.
        baseline: of "grpo", what a reward is compared with: "mean" of its group, or of the others
            alone ("leave_one_out").
        scale: of "grpo", "std" divides by the group's standard deviation, "none" does not.
        average: of "grpo", over what the loss is a mean: "token", "row" or "constant" length.
        redraws: of "grpo", how often at most completions are drawn again whose group is uniform.
        updates: of "grpo", updates made of the completions of each step (num_iterations, mu). After
            the first one they weigh by the ratio of probabilities, which is clipped.
        epsilon_low, epsilon_high: how far below and above 1 that ratio counts (clip-higher of
            DAPO: 0.2 and 0.28).
        sampling_dtype: of "grpo", dtype of the activations with which completions are drawn, such
            as "bfloat16"; by default the model's.
        importance_cap: of "grpo", highest weight of a token by the ratio of its probability in
            training to that in sampling (truncated importance sampling); by default tokens are
            not weighed.
        stop: texts that end a completion, such as ("Question:",), and are not judged as a part of
            it. What is learnt from still has their tokens, or nothing would learn to end there.
        traces: prompts that the guide answers in all.
        chains: completions of each of them that it writes, of which those are learnt that `keep`
            leaves; by default 8 for a "majority", and else one.
        at_once: prompts that it answers at the same time, each `chains` times.
        vote_margin: share of a prompt's completions by which the "majority" answer must lead.
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
        None, 1, MOST_COUNT, note=', or None for 8 of a "majority" and else 1'
    )
    at_once: int = number(64, 1, MOST_COUNT)
    vote_margin: float = number(0.25, 0, 1)

    @property
    def chains_of_prompt(self) -> int:
        """The completions of each prompt that the guide writes."""
        if self.chains is not None:
            return self.chains
        return _VOTES if self.keep == "majority" else 1

    def __post_init__(self):
        """Checks the stop strings.

        Raises:
            ValueError: an empty string.
        """
        if "" in self.stop:
            raise ValueError(
                "`config.test_time.stop` must hold no empty text; got one."
            )
