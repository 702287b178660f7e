"""The data pipeline: from paths to batches, as a pure function of the seed and the step.

It produces NumPy arrays; a `Batch` may also hold JAX arrays. This package does not depend on the
model.
"""

from rwkv7_jax.data.batch import Batch, BatchLike
from rwkv7_jax.data.batching import batch_at, batches_from, host_rows, left_out, windows
from rwkv7_jax.data.builtin_corpora import BUILT_IN
from rwkv7_jax.data.documents import Document, Segment
from rwkv7_jax.data.jsonl import ReadStats, read_jsonl, read_log
from rwkv7_jax.data.loading import packed, token_stream
from rwkv7_jax.data.prefetch import Prefetch
from rwkv7_jax.data.readers import documents as read_documents
from rwkv7_jax.data.sources import (
    Source,
    TaskSource,
    TextSource,
    parse_source,
    parse_sources,
)
from rwkv7_jax.data.tasks.synthetic_tasks import question_batch, task_batch
from rwkv7_jax.data.token_cache import CacheMetadata, read_card, write_cache
from rwkv7_jax.data.token_streams import TokenArray, TokenStream, as_stream, data_hash

# `readers.documents` is renamed here, because `documents` is a module of this package.
__all__ = [
    "BUILT_IN",
    "Batch",
    "BatchLike",
    "CacheMetadata",
    "Document",
    "Prefetch",
    "ReadStats",
    "Segment",
    "Source",
    "TaskSource",
    "TextSource",
    "TokenArray",
    "TokenStream",
    "as_stream",
    "batch_at",
    "batches_from",
    "data_hash",
    "host_rows",
    "left_out",
    "packed",
    "parse_source",
    "parse_sources",
    "question_batch",
    "read_card",
    "read_documents",
    "read_jsonl",
    "read_log",
    "task_batch",
    "token_stream",
    "windows",
    "write_cache",
]
