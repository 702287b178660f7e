"""What each mode of train.py trains: trainables, loss, data, and what is kept at the end. Level 7.

A mode is a tree of trainables and a loss over them; the loop in train.py knows neither.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoint import load_model, model_hash, save_model
from .config import RWKV7Config
from .data import packed, token_stream, windows
from .evaluation import answers, score
from .loss import Loss
from .model import RWKV7
from .settings import Settings
from .shapes import Params
from .state import RWKV7State, init_state
from .state_files import save_state
from .state_tuning import LEAVES, scaled, state_loss
from .tasks import task_batch
from .tokenizer import Tokenizer
from .training import pretrain_loss


@dataclasses.dataclass(frozen=True)
class Job:
    """One run's work.

    Attributes:
        model: the shell.
        tokenizer: of the model's vocabulary.
        trainables: what is trained, as it starts.
        trained: how many numbers of it move.
        loss: of trainables and a batch.
        weights: the model's weights, from trainables.
        start: the start state (batch 1), from trainables.
        save: writes the result into a folder and gives the file's path.
    """

    model: RWKV7
    tokenizer: Tokenizer
    trainables: Any
    trained: int
    loss: Loss
    weights: Callable[[Any], Params]
    start: Callable[[Any], RWKV7State]
    save: Callable[[Path, Any], Path]


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def load(settings: Settings) -> tuple[RWKV7, Params]:
    """The model of `config.init`, changed as `config.model` says, or a new one of those sizes.

    Raises:
        ValueError: neither is given, or a change that the checkpoint's sizes do not allow.
    """
    if settings.init:
        params, config = load_model(settings.init)
        fixed = [k for k in settings.model if k not in ("dtype", "remat", "implementation")]
        if fixed:
            raise ValueError(
                f"`config.model.{fixed[0]}` is fixed by the checkpoint {settings.init}; "
                "only dtype, remat and implementation may be changed."
            )
        return RWKV7(dataclasses.replace(config, **settings.model)), params
    if not settings.model:
        raise ValueError("`config.init` must name a checkpoint, or `config.model` the new sizes.")
    model = RWKV7(RWKV7Config(**settings.model))
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(lambda key: model.init(key, tokens, init_state(model.config)))
    return model, init(jax.random.key(settings.seed))["params"]


def _pretrain(settings: Settings) -> Job:
    model, params = load(settings)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    def save(folder: Path, trained: Params) -> Path:
        save_model(folder / "model.pth", trained, model.config)
        return folder / "model.pth"

    return Job(
        model=model,
        tokenizer=Tokenizer.for_vocabulary(model.config.vocab_size),
        trainables=params,
        trained=_count(params),
        loss=pretrain_loss(model, l2wrap=settings.optimizer.l2wrap),
        weights=lambda trained: trained,
        start=lambda trained: init_state(model.config),
        save=save,
    )


def _state(settings: Settings) -> Job:
    if not settings.init:
        raise ValueError("`config.init` must name the checkpoint whose start state is tuned.")
    model, params = load(settings)
    tuning = settings.tuning
    if tuning.anchor and not tuning.anchor_path:
        raise ValueError("`config.tuning.anchor_path` must name the text of the anchor.")
    leaves = LEAVES if tuning.leaves == "all" else ("wkv",)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), init_state(model.config))

    def save(folder: Path, tuned: RWKV7State) -> Path:
        result, path = scaled(tuned, tuning.alpha), folder / "state.pth"
        info = {"base_model": model_hash(params, model.config), "alpha": tuning.alpha}
        save_state(path, result, config=model.config, info=info)
        return path

    return Job(
        model=model,
        tokenizer=Tokenizer.for_vocabulary(model.config.vocab_size),
        trainables=start,
        trained=_count([getattr(start, name) for name in leaves]),
        loss=state_loss(
            model,
            params,
            leaves=leaves,
            anchor=tuning.anchor,
            l2wrap=settings.optimizer.l2wrap,
        ),
        weights=lambda tuned: params,
        start=lambda tuned: tuned,
        save=save,
    )


MODES = {"pretrain": _pretrain, "state": _state}


def make_job(settings: Settings) -> Job:
    """The work of `settings.mode`.

    Raises:
        ValueError: an unknown mode, or settings that the mode cannot work with.
    """
    if settings.mode not in MODES:
        raise ValueError(f"`config.mode` must be one of {', '.join(MODES)}; got {settings.mode!r}.")
    return MODES[settings.mode](settings)


def _stream(settings: Settings, path: str, tokenizer: Tokenizer, split: str) -> np.ndarray:
    if not path:
        raise ValueError("`config.data.path` must name what to read.")
    data = settings.data
    return token_stream(
        path.split(","), tokenizer, split=split, held_out=data.held_out, on_bad=data.on_bad
    )


def _task(path: str) -> str:
    """The synthetic task that a path names, or nothing."""
    return path.removeprefix("task:") if path.startswith("task:") else ""


def training_stream(settings: Settings, tokenizer: Tokenizer) -> np.ndarray:
    """The ids that a run trains on; of a synthetic task, which has no end, some examples."""
    data = settings.data
    if task := _task(data.path):
        some = task_batch(task, 0, batch_size=64, length=data.length, seed=settings.seed)
        return some["tokens"].reshape(-1)
    return _stream(settings, data.path, tokenizer, "train")


def batches(
    settings: Settings, stream: np.ndarray, tokenizer: Tokenizer, *, start_step: int = 0
) -> Iterator[dict]:
    """The batches from `start_step` on: a pure function of the seed and the step."""
    data = settings.data
    sizes = {"batch_size": data.batch_size, "length": data.length}
    pack = functools.partial(packed, tokenizer=tokenizer, start_step=start_step, **sizes)

    def examples(task: str, seed: int) -> Iterator[dict]:
        batch = functools.partial(task_batch, task, seed=seed, **sizes)
        return map(batch, itertools.count(start_step))

    seed, task, general = settings.seed, _task(data.path), settings.tuning.anchor_path
    main = examples(task, seed) if task else pack(stream, seed=seed)
    if not settings.tuning.anchor:
        return main
    if task := _task(general):
        anchor = examples(task, seed + 1)
    else:
        anchor = pack(_stream(settings, general, tokenizer, "train"), seed=seed + 1)
    return (one | {"anchor": two["tokens"]} for one, two in zip(main, anchor, strict=True))


def held_out(settings: Settings, tokenizer: Tokenizer, *, path: str = "") -> dict:
    """Windows of `path`, else of `config.data.evaluation`, else of the held-out documents."""
    measure, own = settings.evaluation, settings.data.evaluation
    if task := _task(path or own or settings.data.path):
        sizes = {"batch_size": measure.windows, "length": measure.length}
        return task_batch(task, 0, seed=settings.seed, held_out=True, **sizes)
    if not path and own:
        stream = _stream(settings, own, tokenizer, "all")
    else:
        stream = _stream(settings, path or settings.data.path, tokenizer, "held_out")
    return windows(stream, measure.length, measure.windows)


Measure = Callable[[Params, RWKV7State], float]


def _measure(settings: Settings, job: Job, name: str, path: str) -> tuple[str, Measure]:
    """A number's name and the number, for one path that evaluation reads."""
    batch = held_out(settings, job.tokenizer, path=path)
    if _task(path or settings.data.evaluation or settings.data.path):
        return (
            f"{name}_accuracy",
            lambda params, state: answers(job.model, params, state, batch).accuracy,
        )
    return (
        f"{name}_bits_per_byte",
        lambda params, state: score(job.model, params, state, batch, job.tokenizer).bits_per_byte,
    )


def measures(settings: Settings, job: Job) -> dict[str, Measure]:
    """What a run watches, by name, each a function of weights and start state (batch 1).

    Of text it is bits per byte, of a synthetic task the accuracy of its answers: `held_out_` of the
    run's own data, `retention_` of `config.evaluation.retention`. There a list of tasks such as
    "task:dictionary,task:mapping" gives a number each, called `dictionary_accuracy` and so on.
    """
    numbers = [_measure(settings, job, "held_out", "")]
    paths = [path for path in settings.evaluation.retention.split(",") if path]
    numbers += [_measure(settings, job, _task(path), path) for path in paths if _task(path)]
    if text := ",".join(path for path in paths if not _task(path)):
        numbers.append(_measure(settings, job, "retention", text))
    return dict(numbers)


def first(iterator: Iterator[dict]) -> tuple[dict, Iterator[dict]]:
    """The first batch, and the iterator as if it had not been taken."""
    one = next(iterator)
    return one, itertools.chain([one], iterator)
