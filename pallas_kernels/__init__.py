"""The WKV-7 recurrence of RWKV-7 as one differentiable op with several implementations."""

from pallas_kernels.dispatch import IMPLEMENTATIONS, available
from pallas_kernels.reference import WKVInputs, wkv7_reference
from pallas_kernels.wkv7 import CHUNKS, RESULTS, wkv7

__all__ = [
    "CHUNKS",
    "IMPLEMENTATIONS",
    "RESULTS",
    "WKVInputs",
    "available",
    "wkv7",
    "wkv7_reference",
]
