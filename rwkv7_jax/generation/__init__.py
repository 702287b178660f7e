"""Generation: token ids in, token ids and a state out.

The compiled decode loop runs on the device; text and stop strings are handled on the host. Import
the function `generate` from `rwkv7_jax` or from `rwkv7_jax.generation.generate`; as an attribute of
this package it would shadow the module of the same name.
"""

from rwkv7_jax.generation.decode_loop import Decoder, DecodeState
from rwkv7_jax.generation.generate import Generation
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.generation.sampling import SamplingParams, exempt_ids, make_options
from rwkv7_jax.generation.streaming import Ending, RowText, decode_with_stop_strings

__all__ = [
    "DecodeState",
    "Decoder",
    "Ending",
    "Generation",
    "RowText",
    "SamplingParams",
    "decode_with_stop_strings",
    "exempt_ids",
    "make_options",
    "prefill_state",
]
