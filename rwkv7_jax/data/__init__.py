"""From paths to batches, as a pure function of the seed and the step.

NumPy only; knows no model.
"""

from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.batching import batch_at, host_rows, left_out, windows
from rwkv7_jax.data.loading import packed, token_stream
from rwkv7_jax.data.token_streams import data_hash

__all__ = [
    "Batch",
    "batch_at",
    "data_hash",
    "host_rows",
    "left_out",
    "packed",
    "token_stream",
    "windows",
]
