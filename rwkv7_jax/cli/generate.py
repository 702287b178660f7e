"""`rwkv7 generate`: generates text from a checkpoint and streams it to the terminal."""

import argparse
import json
import os
from typing import NamedTuple

import numpy as np

from rwkv7_jax.cli.answers import (
    Stream,
    add_escape_option,
    add_sampling_options,
    add_stop_options,
    add_tools_option,
    drawing,
    note_ids_without_entry,
    read_tools_file,
    stop_strings,
)
from rwkv7_jax.cli.arguments import (
    path,
    refuse_inputs,
    state_target,
    unescape,
)
from rwkv7_jax.cli.inputs import (
    PROMPT_HELP,
    LoadedModel,
    add_any_base_option,
    add_model_options,
    add_vocabulary_option,
    read_model,
    read_prompt,
)
from rwkv7_jax.cli.session import (
    check_savable,
    is_chat,
    logits_to_go_on,
    save_session,
)
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.generation.generate import Generation, generate
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.observer.files import load_observer
from rwkv7_jax.observer.observer import propose
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.chat_template import (
    CHAT_STOP,
    THINK_MODES,
    TURN_END,
    answer_opening,
    chat_prompt,
)
from rwkv7_jax.text.tokenizer import Tokenizer


def add_generate_command(subparsers) -> argparse.ArgumentParser:
    """Adds the parser of `generate` to those of `rwkv7`."""
    parser = subparsers.add_parser("generate", help=COMMANDS["generate"])
    add_model_options(parser)
    _add_start_options(parser)
    _add_prompt_options(parser)
    add_sampling_options(parser)
    add_stop_options(parser)
    add_vocabulary_option(parser, "the model's")
    add_escape_option(parser, "--prompt and --stop")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end instead of streaming",
    )
    parser.set_defaults(run=run_generate, computes=True, waits=False)
    return parser


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select the start state."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--state",
        type=path,
        help="start state: a tuned state, or one written by --save-state",
    )
    start.add_argument(
        "--observer",
        metavar="FOLDER",
        type=path,
        help="observer that reads the prompt instead of the model and proposes the start state",
    )
    add_any_base_option(parser)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the prompt, and for the file of the resulting state."""
    add = parser.add_argument
    add(
        "--prompt",
        help=f"text to continue; {PROMPT_HELP}; omit it to continue the answer of a --save-state",
    )
    add(
        "--save-state",
        metavar="FILE",
        type=state_target,
        help="write the state after the answer, to continue from with --state",
    )
    add("--chat", action="store_true", help="answer the prompt as a user's message")
    _add_chat_options(parser)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that require --chat."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="with --chat: system prompt")
    add(
        "--think",
        choices=tuple(THINK_MODES),
        help="with --chat: think mode of the answer; fast is an empty thought (off)",
    )
    add_tools_option(parser, "with --chat: ")


class _Texts(NamedTuple):
    """The texts of one call.

    Attributes:
        prompt: all text that the model reads.
        opening: the end of the prompt, which is the beginning of the answer.
        stop_strings: stop sequences.
        is_chat: whether the model answers a message.
    """

    prompt: bytes
    opening: str
    stop_strings: list[str]
    is_chat: bool


def run_generate(options: argparse.Namespace) -> str | None:
    """Generates text; streams it, or returns it as JSON."""
    _check_target(options)
    _check_prompt(options)
    _check_chat_options(options)
    texts = _read_texts(options)
    model = read_model(options.model, weights=options.weights, dtype=options.dtype)
    tokenizer = model.tokenizer(options.vocabulary)
    state = None
    logits = None
    if options.state:
        state = model.load_state(options.state, any_base=options.any_base)
        check_savable("generate: `--save-state`", options.save_state, state)
        if not texts.prompt:
            has_prompt = options.prompt is not None
            logits = logits_to_go_on(options.state, model.config, has_prompt=has_prompt)
        texts = _after_state(options, texts, goes_on=logits is not None)
    prompt_ids = [] if logits is not None else _encode_prompt(tokenizer, texts.prompt)
    # The ids that the model reads; an observer reads the others.
    unread = prompt_ids
    if options.observer:
        # As in training, the model reads the last token, which it needs for logits.
        state = _propose(options.observer, model, prompt_ids[:-1])
        unread = prompt_ids[-1:]
    # The opening is part of the answer.
    stream = Stream(texts.opening, goes_on=bool(options.save_state))
    waits = report_wait("the answer") if options.json else stream
    with waits:
        out = generate(
            model.module,
            model.params,
            unread,
            state,
            stop_strings=texts.stop_strings,
            on_text=None if options.json else stream,
            logits=logits,
            **drawing(options, tokenizer),
        )
    if options.save_state:
        save_session(
            options.save_state,
            model,
            out.state,
            logits=out.logits,
            is_chat=texts.is_chat,
        )
    note_ids_without_entry(tokenizer, out.tokens[0])
    if options.json:
        return _to_json(out, texts, len(prompt_ids))
    stream.close()
    return None


def _encode_prompt(tokenizer: Tokenizer, prompt: bytes) -> list[int]:
    """Returns the ids of a prompt; for an empty one, the end-of-text id."""
    ids = tokenizer.encode(prompt) or list(tokenizer.stop_ids)
    if not ids:
        raise ValueError(
            f"generate: `--prompt` must hold a token, because {tokenizer.name} has no end of text "
            "to start from."
        )
    return ids


def _check_target(options: argparse.Namespace) -> None:
    """Raises if `--save-state` would overwrite the model; it may overwrite `--state`."""
    inputs = {"--model": [options.model], "--observer": [options.observer]}
    refuse_inputs("generate: `--save-state`", options.save_state, inputs)


def _check_prompt(options: argparse.Namespace) -> None:
    """Raises if there is neither a prompt nor a state."""
    if options.prompt is None and not options.state:
        raise ValueError(
            "generate: `--prompt` must be given, unless `--state` is a file of `--save-state`; got "
            "neither."
        )


def _read_texts(options: argparse.Namespace) -> _Texts:
    """Reads the prompt and the stop sequences; in a chat, the prompt becomes a turn."""
    prompt = b"" if options.prompt is None else read_prompt(options.prompt)
    stops = stop_strings(options, "generate")
    # Standard input holds real line breaks.
    if options.escape and options.prompt != "-":
        prompt = unescape(prompt, "generate: `--prompt`")
    opening = ""
    if options.chat:
        stops.append(CHAT_STOP)
        # Without a message, the previous answer continues.
        if options.prompt is not None:
            prompt, opening = _chat_texts(options, prompt)
    return _Texts(prompt, opening, stops, options.chat)


def _after_state(
    options: argparse.Namespace, texts: _Texts, *, goes_on: bool
) -> _Texts:
    """Adapts the texts to what the state of `--state` has read.

    Args:
        options: options of the command.
        texts: the texts without a state.
        goes_on: whether the previous answer continues without a prompt.
    """
    if not is_chat(options.state):
        return texts
    if goes_on:
        # The continued answer keeps its stop sequence.
        stop_strings = [*texts.stop_strings, CHAT_STOP]
        return texts._replace(stop_strings=stop_strings, is_chat=True)
    if options.chat:
        # The state has read an answer but not the blank line that ends a turn.
        return texts._replace(prompt=TURN_END.encode() + texts.prompt)
    return texts


def _chat_texts(options: argparse.Namespace, message: bytes) -> tuple[bytes, str]:
    """Formats the message as a turn; returns it, and the beginning of the answer in it."""
    think = options.think or "off"
    tools = read_tools_file(options.tools, "generate")
    # Recover the bytes of the command line.
    system = os.fsencode(options.system or "")
    prompt = chat_prompt(message, system=system, think=think, tools=tools)
    return prompt, answer_opening(think, tools).lstrip()


def _check_chat_options(options: argparse.Namespace) -> None:
    """Raises for chat options without `--chat` or `--prompt`."""
    for name in ("system", "think", "tools"):
        if getattr(options, name) is None:
            continue
        if not options.chat:
            raise ValueError(f"generate: `--{name}` must come with `--chat`.")
        if options.prompt is None:
            raise ValueError(f"generate: `--{name}` must come with `--prompt`.")


def _propose(folder: str, model: LoadedModel, ids: list[int]) -> RWKV7State:
    """Lets an observer read the ids and propose the model's start state."""
    if not ids:
        raise ValueError(
            "generate: `--prompt` must have at least two tokens with `--observer`."
        )
    # The states mean nothing to other weights of the same sizes.
    observer, params = load_observer(folder, model.config, base_model=model.hash)
    with report_wait("the observer's proposal"):
        return propose(observer, params, np.asarray([ids], np.int32))


def _to_json(out: Generation, texts: _Texts, prompt_tokens: int) -> str:
    """Formats the result as one JSON object.

    Args:
        out: the generated text.
        texts: the prompt and the opening of the answer.
        prompt_tokens: number of prompt tokens.
    """
    assert out.texts is not None
    fields = {
        "prompt": texts.prompt.decode(errors="replace"),
        "opening": texts.opening,
        "text": out.texts[0],
        "prompt_tokens": prompt_tokens,
        "tokens": out.tokens[0],
        "finished": out.finished[0],
    }
    return json.dumps(fields)
