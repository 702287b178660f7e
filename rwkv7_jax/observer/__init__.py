"""The observer: a small model that reads a prompt and proposes the teacher's start state."""

from rwkv7_jax.observer.evaluation import Answers, evaluate_handover, proposal_error
from rwkv7_jax.observer.files import load_observer, observer_info, save_observer
from rwkv7_jax.observer.loss import ObserverLoss, observer_loss
from rwkv7_jax.observer.observer import (
    Moments,
    Observer,
    init_observer,
    propose,
    state_moments,
)
from rwkv7_jax.observer.prompt_splits import add_prompt_splits, continuations

__all__ = [
    "Answers",
    "Moments",
    "Observer",
    "ObserverLoss",
    "add_prompt_splits",
    "continuations",
    "evaluate_handover",
    "init_observer",
    "load_observer",
    "observer_info",
    "observer_loss",
    "proposal_error",
    "propose",
    "save_observer",
    "state_moments",
]
