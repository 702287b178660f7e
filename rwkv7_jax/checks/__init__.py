"""Argument checks shared by the public functions.

A check knows the argument but not the function that the user called: its message begins with the
argument in backticks. The public function adds its own name with `prefix_errors`.
"""

from rwkv7_jax.checks.arrays import (
    as_array,
    check_indices,
    check_not_donated,
    check_placed,
    is_known,
    is_traced,
)
from rwkv7_jax.checks.errors import escape_controls, first_line, prefix_errors
from rwkv7_jax.checks.models import (
    check_model,
    check_not_intercepted,
    check_params,
    check_runnable,
    is_intercepted,
)
from rwkv7_jax.checks.tokens import (
    check_ids,
    check_lengths,
    check_prompts,
    check_tokenizer,
    check_tokens,
)
from rwkv7_jax.checks.values import (
    as_float,
    check_choice,
    check_count,
    check_function,
    check_instance,
    check_key,
    check_number,
    check_seed,
    check_size,
    is_real_number,
    typed_key,
)

__all__ = [
    "as_array",
    "as_float",
    "check_choice",
    "check_count",
    "check_function",
    "check_ids",
    "check_indices",
    "check_instance",
    "check_key",
    "check_lengths",
    "check_model",
    "check_not_donated",
    "check_not_intercepted",
    "check_number",
    "check_params",
    "check_placed",
    "check_prompts",
    "check_runnable",
    "check_seed",
    "check_size",
    "check_tokenizer",
    "check_tokens",
    "escape_controls",
    "first_line",
    "is_intercepted",
    "is_known",
    "is_real_number",
    "is_traced",
    "prefix_errors",
    "typed_key",
]
