"""Serving: many requests at once, each from the start state that it names."""

from rwkv7_jax.serving.engine import Engine, Ticket
from rwkv7_jax.serving.requests import Answer, Request, TooBusy, UnknownState

__all__ = ["Answer", "Engine", "Request", "Ticket", "TooBusy", "UnknownState"]
