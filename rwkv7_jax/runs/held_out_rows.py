"""Rows that models and start states are measured on, so that differences are their own."""

from typing import NamedTuple

from rwkv7_jax.array_types import Params
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.choices import Packing
from rwkv7_jax.data.sources import TaskSource, parse_sources
from rwkv7_jax.evaluation.scoring import Answers, Score, score, score_answers
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.datasets import held_out, held_out_source
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.text.tokenizer import Tokenizer

# Questions of a task that are read at the same time.
_ROWS_AT_ONCE = 32


class HeldOutRows(NamedTuple):
    """Held-out rows of a text or of a synthetic task.

    Attributes:
        batch: the rows.
        tokenizer: tells how many bytes a token has.
        is_task: whether they are questions of a synthetic task; else they are text.
    """

    batch: Batch
    tokenizer: Tokenizer
    is_task: bool

    @classmethod
    def read(
        cls,
        settings: Settings,
        tokenizer: Tokenizer,
        *,
        answers: Packing | None = None,
        path: str | None = None,
    ) -> "HeldOutRows":
        """Reads the rows; the arguments are those of `datasets.held_out`."""
        batch = held_out(settings, tokenizer, answers=answers, path=path)
        source = held_out_source(settings.data, path)
        return cls(batch, tokenizer, isinstance(source, TaskSource))

    def measure(
        self, model: RWKV7, params: Params, start: RWKV7State
    ) -> Score | Answers:
        """Measures how well the model predicts the rows from a start state."""
        if self.is_task:
            # Fewer would be filled up.
            rows = min(len(self.batch.tokens), _ROWS_AT_ONCE)
            return score_answers(model, params, start, self.batch, rows=rows)
        return score(model, params, start, self.batch, self.tokenizer)

    def some(self, windows: int) -> "HeldOutRows":
        """Takes some of the rows, spread over all of them."""
        apart = max(len(self.batch.tokens) // windows, 1)
        chosen = slice(0, apart * windows, apart)
        return self._replace(batch=self.batch.select_rows(chosen))


def retention_paths(retention: str, *, texts: str = "retention") -> dict[str, str]:
    """Splits `config.evaluation.retention` into paths to measure, by names for what they measure.

    Each task of a list such as "task:dictionary,task:mapping" is measured by itself, under the
    task's name; all other text is measured together.

    Args:
        retention: the setting.
        texts: the name for the text.
    """
    # Tasks have accuracies that would hide each other in a mean; text has one loss.
    tasks, source = parse_sources(retention, "`config.evaluation.retention`")
    paths = {task.name: str(task) for task in tasks}
    if source.paths:
        paths[texts] = str(source)
    return paths
