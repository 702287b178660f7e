"""The WKV-7 recurrence of RWKV-7 as one differentiable op with several implementations. Level 0."""

from .dispatch import IMPLEMENTATIONS, available
from .reference import wkv7_reference
from .wkv7 import CHUNKS, wkv7

__all__ = ["CHUNKS", "IMPLEMENTATIONS", "available", "wkv7", "wkv7_reference"]
