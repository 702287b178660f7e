"""Sampling options, stop options and streamed output of `generate` and `chat`."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import jax

from rwkv7_jax.cli.arguments import (
    MOST_TOKENS,
    integer,
    integers,
    number,
    path,
    stop_text,
    unescape,
)
from rwkv7_jax.cli.output import name_output
from rwkv7_jax.generation.sampling import exempt_ids
from rwkv7_jax.runs.process import shown_on
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.chat_template import read_tools
from rwkv7_jax.text.tokenizer import Tokenizer

# Seeds are signed 64-bit integers, as in JAX.
_SEEDS = 2**63


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds the sampling options."""
    add = parser.add_argument
    add(
        "--tokens",
        type=integer(0, MOST_TOKENS),
        default=256,
        help="most tokens of an answer (%(default)s)",
    )
    add("--temperature", type=number(0), default=0.8, help="0 is greedy (%(default)s)")
    add(
        "--top-p",
        type=number(0, 1),
        default=0.9,
        help="probability mass to keep (%(default)s)",
    )
    add(
        "--top-k",
        type=integer(0),
        default=0,
        help="tokens to keep; 0 keeps all (%(default)s)",
    )
    add(
        "--presence-penalty",
        type=number(),
        default=0.0,
        help="penalty on each token that was used (%(default)s)",
    )
    add(
        "--frequency-penalty",
        type=number(),
        default=0.0,
        help="penalty on each use of a token (%(default)s)",
    )
    add(
        "--penalty-decay",
        type=number(0, 1),
        default=0.996,
        help="factor on the usage counts at every token (%(default)s)",
    )
    add(
        "--seed",
        type=integer(-_SEEDS, _SEEDS - 1),
        default=0,
        help="random seed; equal seeds give equal text (%(default)s)",
    )


def add_stop_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that end an answer."""
    add = parser.add_argument
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        type=stop_text,
        help="stop sequence, which the answer does not include; repeatable",
    )
    add(
        "--stop-ids",
        default=(),
        metavar="IDS",
        type=integers(0),
        help="comma-separated ids that end an answer, besides the vocabulary's end of text",
    )


def add_escape_option(parser: argparse.ArgumentParser, where: str) -> None:
    """Adds the option that interprets escapes in the options that `where` names."""
    parser.add_argument(
        "--escape",
        action="store_true",
        help=r"interpret the escapes \n, \t, \r, \xNN, \uNNNN and \\ in "
        f"{where}; by default a backslash is literal",
    )


def stop_strings(options: argparse.Namespace, command: str) -> list[str]:
    """Returns the stop sequences of `--stop`, with escapes replaced under `--escape`.

    Args:
        options: the options of `add_stop_options` and `add_escape_option`.
        command: the name of the command, for messages.

    Raises:
        ValueError: an unknown escape.
    """
    if options.escape:
        stops = []
        for text in options.stop:
            data = unescape(os.fsencode(text), f"{command}: `--stop`")
            stops.append(os.fsdecode(data))
        return stops
    if any("\\n" in text for text in options.stop):
        print(
            "note: `--stop` has a backslash and an n; --escape reads them as a line break.",
            file=sys.stderr,
        )
    return list(options.stop)


def add_tools_option(parser: argparse.ArgumentParser, before: str = "") -> None:
    """Adds the option that lists functions to call; `before` begins its help."""
    parser.add_argument(
        "--tools",
        metavar="FILE",
        type=path,
        help=f"{before}tools, as a JSON list of objects with name, description and arguments, or "
        "in the format of OpenAI's API",
    )


def read_tools_file(file: str | None, command: str) -> tuple[str, ...]:
    """Reads the functions of `--tools` in the form of the chat template; none without a file.

    Args:
        file: the value of the option.
        command: the name of the command, for messages.

    Raises:
        ValueError: the file holds no list of functions.
    """
    if file is None:
        return ()
    try:
        return read_tools(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{command}: `--tools` must be a JSON list of functions; {file}: {error}."
        ) from None


def drawing(
    options: argparse.Namespace, tokenizer: Tokenizer, *, answers: int = 0
) -> dict[str, Any]:
    """Returns the sampling and stop arguments of `generate`.

    Args:
        options: parsed options of `add_sampling_options` and `add_stop_options`.
        tokenizer: tokenizer of the model.
        answers: number of earlier answers; each answer has a different seed.
    """
    # The seed wraps around.
    seed = (options.seed + answers + _SEEDS) % (2 * _SEEDS) - _SEEDS
    return {
        "tokens": options.tokens,
        "stop_ids": (*tokenizer.stop_ids, *options.stop_ids),
        "tokenizer": tokenizer,
        "key": jax.random.key(seed),
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "penalty_decay": options.penalty_decay,
        "penalty_exempt": exempt_ids(tokenizer),
    }


class Stream:
    """A printer of streamed text that can defer an output error until results are saved.

    As a context it reports on stderr that the first text is waited for: the model may read a long
    prompt, and compiles. Later messages would be printed amid the text.
    """

    def __init__(self, opening: str = "", *, goes_on: bool):
        """Sets the error handling.

        Args:
            opening: text before the first piece.
            goes_on: whether to defer an output error until `close`.
        """
        self._opening = opening
        self._goes_on = goes_on
        self._error: OSError | None = None
        self._wait = contextlib.ExitStack()

    def __enter__(self) -> "Stream":
        """Begins to wait for the first piece, and returns itself."""
        self._wait.enter_context(report_wait("the first text of the answer"))
        return self

    def __exit__(self, *failure: object) -> None:
        """Ends the wait."""
        self._wait.close()

    def __call__(self, piece: str, row: int) -> None:
        """Writes a piece of text and flushes; there is only one row."""
        del row
        self._wait.close()
        if self._error is not None:
            return
        text = self._opening + piece
        self._opening = ""
        try:
            with name_output():
                sys.stdout.write(shown_on(sys.stdout, text))
                sys.stdout.flush()
        except OSError as error:
            if not self._goes_on:
                raise
            self._error = error

    def close(self) -> None:
        """Ends the last line, or raises the deferred error."""
        if self._opening:
            self("", 0)
        if self._error is not None:
            raise self._error
        with name_output():
            print(flush=True)


def note_ids_without_entry(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Prints a note to stderr if ids were generated that the vocabulary cannot decode."""
    silent = [number for number in ids if not tokenizer.token_bytes(number)]
    if silent:
        print(
            f"note: {len(silent)} of the {len(ids)} ids decode to nothing in {tokenizer.name}; "
            f"the first is {silent[0]}.",
            file=sys.stderr,
        )
