"""What eval.py compares: one model from several start states, on the same held-out rows."""

import dataclasses
import functools

import numpy as np

from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import model_hash
from rwkv7_jax.checkpoints.state_files import load_state
from rwkv7_jax.evaluation.scoring import Answers, Score
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state
from rwkv7_jax.runs.held_out_rows import HeldOutRows, retention_paths
from rwkv7_jax.runs.modes.model_setup import load_or_init, tokenizer_of
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model and the start states to compare.

    Attributes:
        model: the model of `params`.
        params: all weights.
        tokenizer: of the model's vocabulary.
        starts: start states by the label of their row in a table; the first is the base.
    """

    model: RWKV7
    params: Params
    tokenizer: Tokenizer
    starts: dict[str, RWKV7State]

    def with_prompts(self, text: np.ndarray, sizes: tuple[int, ...]) -> "Comparison":
        """Adds the state after each of several prompts, taken from the end of a text.

        Args:
            text: token ids.
            sizes: lengths of the prompts in tokens; -1 for the whole text.
        """
        starts = dict(self.starts)
        for size in sizes:
            prompt = text if size < 0 else text[-size:]
            print(f"reading a prompt of {len(prompt):,} tokens", flush=True)
            with report_wait("the state after the prompt"):
                state = prefill_state(self.model, self.params, prompt)
            starts[f"prompt {len(prompt):,}"] = state
        return dataclasses.replace(self, starts=starts)

    def measure(self, rows: HeldOutRows) -> dict[str, Score | Answers]:
        """Measures every start state on the same rows."""
        scores = {}
        for name, start in self.starts.items():
            with report_wait(f"the scores of {name}"):
                scores[name] = rows.measure(self.model, self.params, start)
        return scores


def load_comparison(settings: Settings) -> Comparison:
    """Loads the model and the tuned states that the settings name.

    Raises:
        ValueError: a file cannot be read, or belongs to another model.
    """
    model, params = load_or_init(settings)
    tokenizer = tokenizer_of(settings, model.config)
    starts = {"base": init_state(model.config)}
    starts |= _tuned_states(settings, model, params)
    return Comparison(model, params, tokenizer, starts)


def _tuned_states(
    settings: Settings, model: RWKV7, params: Params
) -> dict[str, RWKV7State]:
    """Loads the tuned states, by the label of their row."""
    starts: dict[str, RWKV7State] = {}
    paths = settings.state_paths
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"`config.state` must name each file once; got {path!r} more than once."
            )
    if not paths:
        return starts
    # With the hash `load_state` rejects states that were tuned on other weights.
    base_model = model_hash(params, model.config)
    for path in paths:
        state = load_state(
            path,
            config=model.config,
            base_model=base_model,
            any_base=settings.any_base,
        )
        label = "tuned state" if state.upscaled is None else "upscaled state"
        # The first state of a kind is labelled by its kind, the others by their paths.
        starts[path if label in starts else label] = state
    return starts


def read_held_out(settings: Settings, tokenizer: Tokenizer) -> dict[str, HeldOutRows]:
    """Reads all rows to measure states on, by title.

    They come from the run's own data and from the tasks and texts in
    `config.evaluation.retention`.

    Raises:
        ValueError: there is nothing to read, there is too little, or no target counts.
    """
    # A start state applies where a question begins, so no row may begin within a question.
    read = functools.partial(HeldOutRows.read, settings, tokenizer, answers="documents")
    own = read()
    found = {"new task" if own.is_task else "new text": own}
    retention = retention_paths(settings.evaluation.retention, texts="own text")
    for title, path in retention.items():
        found[title] = read(path=path)
    return found
