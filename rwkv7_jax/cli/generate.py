"""`rwkv7 generate`: text from a checkpoint, streamed to the terminal."""

import argparse
import json
import os
import sys

import jax
import numpy as np

from rwkv7_jax.cli.inputs import (
    MODEL_HELP,
    PROMPT_HELP,
    LoadedModel,
    read_model,
    read_prompt,
)
from rwkv7_jax.generation.generate import Generation, generate
from rwkv7_jax.generation.sampling import exempt_ids
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.observer.files import load_observer
from rwkv7_jax.observer.observer import propose
from rwkv7_jax.text.chat_template import CHAT_STOP, chat_prompt
from rwkv7_jax.text.tokenizer import Tokenizer

# Token 0 ends documents, so it is what a text without a prompt begins after.
_EMPTY_PROMPT = [0]


def add_generate_command(subparsers) -> argparse.ArgumentParser:
    """Adds the parser of `generate` to those of `rwkv7`."""
    parser = subparsers.add_parser(
        "generate", help="continue a text or answer a message"
    )
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--state", help="tuned state to start from")
    start.add_argument(
        "--observer",
        metavar="FOLDER",
        help="observer that reads the prompt in the model's place and proposes its start state",
    )
    add("--prompt", required=True, help=f"text to continue; {PROMPT_HELP}")
    add("--chat", action="store_true", help="the prompt is a user's message to answer")
    add(
        "--tokens",
        type=int,
        default=256,
        help="longest answer, in tokens (%(default)s)",
    )
    add("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    add(
        "--top-p",
        type=float,
        default=0.9,
        help="probability mass to keep (%(default)s)",
    )
    add(
        "--top-k", type=int, default=0, help="tokens to keep; 0 keeps all (%(default)s)"
    )
    add(
        "--presence-penalty",
        type=float,
        default=0.0,
        help="on tokens used (%(default)s)",
    )
    add(
        "--frequency-penalty", type=float, default=0.0, help="on each use (%(default)s)"
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same text (%(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; repeatable",
    )
    add(
        "--json",
        action="store_true",
        help="one JSON object at the end instead of a stream",
    )
    parser.set_defaults(run=run_generate, compiles=True)
    return parser


def run_generate(options: argparse.Namespace) -> int:
    """Writes the text and returns the exit code; a reader that has gone away is no error."""
    try:
        _run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    return 0


def _run(options: argparse.Namespace) -> None:
    """Generates, and prints while or after it does."""
    prompt = read_prompt(options.prompt)
    stop_strings = list(options.stop)
    if options.chat:
        prompt = chat_prompt(prompt)
        stop_strings.append(CHAT_STOP)
    model = read_model(options.model)
    tokenizer = Tokenizer.for_vocabulary(model.config.vocab_size)
    prompt_ids = tokenizer.encode(prompt) or _EMPTY_PROMPT
    # What the model itself reads.
    unread = prompt_ids
    state = None
    if options.state:
        state = model.load_state(options.state)
    elif options.observer:
        # As in training: the last token stays for the model, which needs one to give logits.
        state = _propose(options.observer, model, prompt_ids[:-1])
        unread = prompt_ids[-1:]
    out = generate(
        model.module,
        model.params,
        unread,
        state,
        tokens=options.tokens,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        penalty_exempt=exempt_ids(tokenizer),
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        on_text=None if options.json else _write,
    )
    if options.json:
        print(_to_json(out, prompt, len(prompt_ids)))
    else:
        # The text was streamed; its last line has no end yet.
        print()


def _propose(folder: str, model: LoadedModel, ids: list[int]) -> RWKV7State:
    """Lets an observer read the ids and propose the model's start state."""
    if not ids:
        raise ValueError(
            "generate: `--prompt` must have at least two tokens with `--observer`."
        )
    # Other weights of the same sizes would be given states that mean nothing to them.
    observer, params = load_observer(folder, model.config, base_model=model.hash)
    return propose(observer, params, np.asarray([ids], np.int32))


def _write(piece: str, row: int) -> None:
    """Writes a piece of text at once; there is one row."""
    del row
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # A terminal of another encoding shows a question mark rather than ending the run.
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _to_json(out: Generation, prompt: bytes, prompt_tokens: int) -> str:
    """Describes the result as one JSON object."""
    assert out.texts is not None
    fields = {
        "prompt": prompt.decode(errors="replace"),
        "text": out.texts[0],
        "prompt_tokens": prompt_tokens,
        "tokens": out.tokens[0],
        "finished": out.finished[0],
    }
    return json.dumps(fields)


def discard_output() -> None:
    """Discards the buffered output, so that the interpreter's last flush is quiet."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        # A test or another program has replaced the stream.
        return
    # Closing the stream would raise once more, so its descriptor is replaced.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
