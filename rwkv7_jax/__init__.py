"""RWKV-7 in JAX, with a first-class state that can be tuned, observed, saved and served.

Public names are imported on first use: importing this package imports neither JAX nor its modules.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The subpackages are public too.
    from rwkv7_jax import (  # noqa: F401
        based,
        checkpoints,
        data,
        evaluation,
        generation,
        model,
        observer,
        optim,
        serving,
        sharding,
        test_time,
        text,
        training,
        tuning,
    )
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
    from rwkv7_jax.training.train_step import (
        TrainState,
        make_eval_step,
        make_train_step,
    )
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

# The modules of the public names, as in the imports above.
_MODULES = {
    "RWKV7": "model.rwkv7",
    "RWKV7Config": "model.config",
    "RWKV7State": "model.state",
    "Tokenizer": "text.tokenizer",
    "TrainState": "training.train_step",
    "build_optimizer": "optim.optimizer",
    "check_state": "model.state",
    "decorrelate": "optim.decorrelation",
    "generate": "generation.generate",
    "init_state": "model.state",
    "load_model": "checkpoints.model_files",
    "load_state": "checkpoints.state_files",
    "make_eval_step": "training.train_step",
    "make_train_step": "training.train_step",
    "pretrain_loss": "training.losses",
    "repeat": "model.state",
    "save_model": "checkpoints.model_files",
    "save_state": "checkpoints.state_files",
    "scaled": "tuning.state_arithmetic",
    "score": "evaluation.scoring",
    "select": "model.state",
    "stack": "model.state",
    "state_loss": "tuning.state_tuning",
    "upscale": "tuning.upscaling",
}


def _load(name: str) -> Any:
    """Imports a public name, or a subpackage such as `model`.

    Raises:
        AttributeError: the name is neither.
    """
    if name in _MODULES:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        value = getattr(module, name)
        # From now on, the name is found without this function.
        globals()[name] = value
        return value
    path = f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # A missing dependency of the subpackage is another error.
        if error.name != path:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# With `__getattr__`, type checkers would accept any name.
if not TYPE_CHECKING:
    __getattr__ = _load


def __dir__() -> list[str]:
    """Lists the public names and the subpackages, imported or not."""
    packages = [
        module.name for module in pkgutil.iter_modules(__path__) if module.ispkg
    ]
    return sorted({*globals(), *__all__, *packages})
