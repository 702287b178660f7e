"""`rwkv7 observe`: writes an observer's proposal for a prompt, or compares it with the teacher."""

import argparse
from pathlib import Path

import numpy as np

from rwkv7_jax.checkpoints import save_state
from rwkv7_jax.cli.arguments import (
    MOST_ROWS,
    MOST_TOKENS,
    integer,
    path,
    refuse_inputs,
    state_target,
)
from rwkv7_jax.cli.inputs import (
    MODEL_HELP,
    PROMPT_HELP,
    LoadedModel,
    add_vocabulary_option,
    read_model,
    read_prompt,
)
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.data.loading import token_stream, windows
from rwkv7_jax.local_paths import split_paths
from rwkv7_jax.observer.evaluation import proposal_error
from rwkv7_jax.observer.files import load_observer, observer_info
from rwkv7_jax.observer.observer import Observer, propose, state_moments
from rwkv7_jax.text.tokenizer import Tokenizer


def add_observe_command(subparsers) -> None:
    """Adds the parser of `observe` to those of `rwkv7`."""
    parser = subparsers.add_parser("observe", help=COMMANDS["observe"])
    add = parser.add_argument
    add("observer", metavar="OBSERVER", type=path, help="folder of the observer")
    add("--model", required=True, type=path, help=f"the teacher's {MODEL_HELP}")
    add("--prompt", required=True, help=f"text to observe; {PROMPT_HELP}")
    add(
        "--out",
        metavar="STATE",
        type=state_target,
        help="write the proposed state: .pth, .safetensors, .st or .state",
    )
    add(
        "--text",
        help="report the proposal's error against the teacher's own state, relative to the "
        "variance of states in this text: a file, a folder, or a built-in text",
    )
    add(
        "--length",
        type=integer(1, MOST_TOKENS),
        default=128,
        help="tokens per window of --text (%(default)s)",
    )
    # A single window has no variance.
    add(
        "--windows",
        type=integer(2, MOST_ROWS),
        default=16,
        help="windows of --text, at least 2 (%(default)s)",
    )
    add_vocabulary_option(parser, "the model's")
    parser.set_defaults(run=run_observe, computes=True)


def run_observe(options: argparse.Namespace) -> str:
    """Writes the proposal, computes its error, or both."""
    _check_options(options)
    model = read_model(options.model)
    observer, params = load_observer(
        options.observer, model.config, base_model=model.hash
    )
    tokenizer = model.tokenizer(options.vocabulary)
    ids = tokenizer.encode(read_prompt(options.prompt))
    if not ids:
        raise ValueError("observe: `--prompt` must not be empty.")
    tokens = np.asarray([ids], np.int32)
    lines = [
        f"{options.observer}: {_sizes(observer)}",
        f"teacher: {observer_info(options.observer)['base_model']}",
        f"prompt: {len(ids):,} tokens",
    ]
    if options.text:
        error = _error(options, model, observer, params, tokens, tokenizer)
        lines.append(
            f"proposal error: {error:.4f} of the variance in {options.text} "
            "(0: the teacher's own state; 1: as bad as the mean state)"
        )
    if options.out:
        info = {
            "base_model": model.hash,
            "made_of": f"proposed by {Path(options.observer).name}",
        }
        state = propose(observer, params, tokens)
        save_state(options.out, state, config=model.config, info=info)
        lines.append(f"wrote {options.out}")
    return "\n".join(lines)


def _check_options(options: argparse.Namespace) -> None:
    """Checks options before minutes of reading."""
    if not options.out and not options.text:
        raise ValueError("observe: `--out` or `--text` must be given; got neither.")
    texts = split_paths(options.text or "", "observe: `--text`")
    inputs = {
        "OBSERVER": [options.observer],
        "--model": [options.model],
        "--text": texts,
    }
    refuse_inputs("observe: `--out`", options.out, inputs)


def _sizes(observer: Observer) -> str:
    """Describes the sizes of both models."""
    own = observer.model.config
    teacher = observer.teacher
    return (
        f"{own.num_layers} layers with {own.num_heads} heads of {own.head_size}, for a teacher's "
        f"{teacher.num_layers} layers with {teacher.num_heads} heads of {teacher.head_size}"
    )


def _error(
    options: argparse.Namespace,
    model: LoadedModel,
    observer: Observer,
    params,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
) -> float:
    """Computes the proposal's error against the state of the teacher after the prompt."""
    texts = split_paths(options.text, "observe: `--text`")
    stream = token_stream(texts, tokenizer)
    batch = windows(stream, options.length, options.windows)
    if len(batch.tokens) < 2:
        raise ValueError(
            f"observe: `--text` must have at least two windows of {options.length} tokens; got "
            f"{len(stream):,} tokens."
        )
    # The variance needs several rows, and the prompt is a single one.
    variance = state_moments(model.module, model.params, batch.tokens).variance
    error = proposal_error(
        observer,
        params,
        model.module,
        model.params,
        tokens,
        variance=variance,
    )
    return float(error[0])
