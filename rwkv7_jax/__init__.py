"""RWKV-7 in JAX, with the state as a first-class thing: tuned, observed, saved, served. Level 6."""

from . import data
from .checkpoint import load_model, save_model
from .config import RWKV7Config
from .evaluation import score
from .generate import generate
from .model import RWKV7
from .optim.build import build_optimizer
from .optim.decorrelation import decorrelate
from .state import RWKV7State, check_state, init_state, repeat, select, stack
from .state_files import load_state, save_state
from .state_tuning import scaled, state_loss, upscale
from .tokenizer import Tokenizer
from .training import TrainState, make_eval_step, make_train_step, pretrain_loss

__all__ = [
    "RWKV7",
    "RWKV7Config",
    "RWKV7State",
    "Tokenizer",
    "TrainState",
    "build_optimizer",
    "check_state",
    "data",
    "decorrelate",
    "generate",
    "init_state",
    "load_model",
    "load_state",
    "make_eval_step",
    "make_train_step",
    "pretrain_loss",
    "repeat",
    "save_model",
    "save_state",
    "scaled",
    "score",
    "select",
    "stack",
    "state_loss",
    "upscale",
]
