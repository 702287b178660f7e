"""The held-out rows on which models and start states are measured and compared."""

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

# The largest number of task questions in a batch.
_ROWS_AT_ONCE = 32


class HeldOutRows(NamedTuple):
    """Held-out rows of a text or of a synthetic task.

    Attributes:
        batch: the rows.
        tokenizer: knows how many bytes a token has.
        is_task: whether the rows are questions of a synthetic task rather than text.
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
        """Reads the rows; see `datasets.held_out` for the arguments."""
        batch = held_out(settings, tokenizer, answers=answers, path=path)
        source = held_out_source(settings.data, path)
        return cls(batch, tokenizer, isinstance(source, TaskSource))

    def measure(
        self, model: RWKV7, params: Params, start: RWKV7State
    ) -> Score | Answers:
        """Measures how well the model predicts the rows from a start state."""
        if self.is_task:
            # A larger batch would only be padded.
            rows = min(len(self.batch.tokens), _ROWS_AT_ONCE)
            return score_answers(model, params, start, self.batch, rows=rows)
        return score(model, params, start, self.batch, self.tokenizer)

    def some(self, windows: int) -> "HeldOutRows":
        """Selects at most `windows` of the rows, at equal distances."""
        apart = max(len(self.batch.tokens) // windows, 1)
        chosen = slice(0, apart * windows, apart)
        return self._replace(batch=self.batch.select_rows(chosen))


def retention_paths(retention: str, *, texts: str = "retention") -> dict[str, str]:
    """Splits `config.evaluation.retention` into named paths to measure separately.

    Each task of a list such as "task:dictionary,task:mapping" is measured separately, under its own
    name. All text is measured together.

    Args:
        retention: the setting.
        texts: the name for the text.
    """
    # A mean over tasks would hide the accuracy of each; texts share one loss.
    tasks, source = parse_sources(retention, "`config.evaluation.retention`")
    paths = {task.name: str(task) for task in tasks}
    if source.paths:
        paths[texts] = str(source)
    return paths
