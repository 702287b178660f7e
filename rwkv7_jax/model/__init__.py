"""The network: pure functions and a thin Linen shell. The state is an argument and a result.

This package imports the kernels, checks and sharding. It knows no files, losses or training loops.
"""

from rwkv7_jax.model.block import RECURRENCE, TRACE
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import Int8Matrix, dequantize, quantize
from rwkv7_jax.model.kernel_features import (
    FEATURE_MAPS,
    KINDS,
    Features,
    kernel_features,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import (
    RWKV7State,
    check_state,
    init_state,
    map_linear_leaves,
    repeat,
    select,
    stack,
    where_rows,
)
from rwkv7_jax.model.upscaled_memory import (
    DYNAMICS,
    MEMORY_FORMS,
    MemoryForm,
    RecurrentMemory,
    Upscaled,
)

__all__ = [
    "DYNAMICS",
    "FEATURE_MAPS",
    "KINDS",
    "MEMORY_FORMS",
    "RECURRENCE",
    "RWKV7",
    "TRACE",
    "Features",
    "Int8Matrix",
    "MemoryForm",
    "RWKV7Config",
    "RWKV7State",
    "RecurrentMemory",
    "Upscaled",
    "check_state",
    "dequantize",
    "init_state",
    "kernel_features",
    "map_linear_leaves",
    "quantize",
    "repeat",
    "select",
    "stack",
    "where_rows",
]
