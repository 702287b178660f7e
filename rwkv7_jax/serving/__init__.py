"""Serving: concurrent requests, each from the start state that it names."""

from rwkv7_jax.serving.engine import Engine
from rwkv7_jax.serving.requests import (
    Answer,
    Closed,
    Piece,
    Request,
    TokenScore,
    TooBusy,
    TooLong,
    UnknownState,
)
from rwkv7_jax.serving.ticket import Ticket
from rwkv7_jax.serving.watchdog import Watchdog

__all__ = [
    "Answer",
    "Closed",
    "Engine",
    "Piece",
    "Request",
    "Ticket",
    "TokenScore",
    "TooBusy",
    "TooLong",
    "UnknownState",
    "Watchdog",
]
