"""RWKV-7 in JAX, with a first-class state that can be tuned, observed, saved and served."""

from rwkv7_jax import data
from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.checkpoints.state_files import load_state, save_state
from rwkv7_jax.evaluation.scoring import score
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import (
    RWKV7State,
    check_state,
    init_state,
    repeat,
    select,
    stack,
)
from rwkv7_jax.optim.decorrelation import decorrelate
from rwkv7_jax.optim.optimizer import build_optimizer
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.training.losses import pretrain_loss
from rwkv7_jax.training.train_step import TrainState, make_eval_step, make_train_step
from rwkv7_jax.tuning.state_arithmetic import scaled
from rwkv7_jax.tuning.state_tuning import state_loss
from rwkv7_jax.tuning.upscaling import upscale

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
