"""`rwkv7 chat`: a conversation in the terminal, whose state is kept between turns."""

import argparse
import collections
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

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
from rwkv7_jax.cli.arguments import path, refuse_inputs, state_target
from rwkv7_jax.cli.errors import reason
from rwkv7_jax.cli.inputs import (
    LoadedModel,
    add_any_base_option,
    add_model_options,
    add_vocabulary_option,
    read_model,
)
from rwkv7_jax.cli.session import check_savable, is_chat, save_session
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.generation.generate import generate
from rwkv7_jax.local_paths import existing_path
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.runs.process import hold_interrupt
from rwkv7_jax.text.chat_template import (
    CHAT_STOP,
    THINK_MODES,
    TURN_END,
    answer_opening,
    chat_prompt,
)

# How many exchanges `/undo` can drop: a state of the 7.2B model takes 33 MB.
_MOST_UNDOS = 8

_HELP = """\
/reset      return to the start
/undo       drop the last exchange
/save FILE  save the state of the conversation; resume it with --state
/help       list the commands
/quit       end the conversation, as the end of input does
Ctrl-C stops an answer. A line that ends with \\ continues in the next. Write a leading / as //."""


def add_chat_command(subparsers) -> None:
    """Adds the parser of `chat` to those of `rwkv7`."""
    parser = subparsers.add_parser("chat", help=COMMANDS["chat"])
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--state",
        type=path,
        help="state to start from: a tuned one, or that of a chat to resume",
    )
    add_any_base_option(parser)
    add("--system", metavar="TEXT", help="system message at the start")
    add(
        "--think",
        choices=tuple(THINK_MODES),
        default="off",
        help="how long answers think first; fast is an empty thought (%(default)s)",
    )
    add_tools_option(parser, "included in the first turn: ")
    add(
        "--save-state",
        metavar="FILE",
        type=state_target,
        help="save the state at the end; resume the chat with --state",
    )
    add_sampling_options(parser)
    add_stop_options(parser)
    add_escape_option(parser, "--stop")
    add_vocabulary_option(parser, "the model's")
    parser.set_defaults(run=run_chat, computes=True, waits=False)


def run_chat(options: argparse.Namespace) -> None:
    """Answers the lines of standard input until its end."""
    _check_target("chat: `--save-state`", options.save_state, options)
    if options.state:
        existing_path(options.state, "chat: `--state`")
    tools = read_tools_file(options.tools, "chat")
    stops = stop_strings(options, "chat")
    model = read_model(options.model, weights=options.weights, dtype=options.dtype)
    conversation = _Conversation(options, model, tools=tools, stops=stops)
    prompt = _prepare_input()
    try:
        _talk(conversation, prompt)
    finally:
        # Also after an error, so that the conversation is not lost.
        conversation.close()


def _check_target(
    argument: str, target: str | None, options: argparse.Namespace
) -> None:
    """Raises if a state would overwrite the model; it may overwrite the file of `--state`."""
    refuse_inputs(argument, target, {"--model": [options.model]})


class _Memory(NamedTuple):
    """What the model has read.

    Attributes:
        state: the state; None if the model has read nothing.
        logits: the logits of the next token; None before the first answer.
        in_chat: whether the model has read an answer but not the end of that turn.
    """

    state: RWKV7State | None
    logits: Float[Array, "1 V"] | None
    in_chat: bool


class _Conversation:
    """A model, and what it had read after each of the last answers."""

    def __init__(
        self,
        options: argparse.Namespace,
        model: LoadedModel,
        *,
        tools: Sequence[str],
        stops: Sequence[str],
    ):
        """Starts from the state of `--state`.

        Args:
            options: the options of the command.
            model: the model that answers.
            tools: functions that the model may call, in the form of the chat template.
            stops: stop sequences.

        Raises:
            ValueError: the state belongs to another model, or the vocabulary cannot encode the
                chat template.
        """
        self._options = options
        self._tools = tools
        self._stops = [*stops, CHAT_STOP]
        self._model = model
        self._tokenizer = model.tokenizer(options.vocabulary)
        self._start = _Memory(None, None, False)
        if options.state:
            state = model.load_state(options.state, any_base=options.any_base)
            check_savable("chat: `--save-state`", options.save_state, state)
            self._start = _Memory(state, None, is_chat(options.state))
        self._memory = self._start
        self._earlier: collections.deque[_Memory] = collections.deque(
            maxlen=_MOST_UNDOS
        )
        self._answers = 0
        try:
            self.encode("")
        except ValueError:
            raise ValueError(
                "chat: `--vocabulary` must encode the chat template, `--system` and `--tools`; "
                f"{self._tokenizer.name} cannot."
            ) from None

    def encode(self, message: str) -> list[int]:
        """Encodes a message as the next turn; the first turn includes the system message and tools.

        Raises:
            ValueError: the vocabulary cannot encode the message.
        """
        is_first = self._memory is self._start
        # This inverts the decoding of the command line by Python.
        system = os.fsencode(self._options.system or "")
        prompt = chat_prompt(
            message.encode("utf-8", "surrogateescape"),
            system=system if is_first else b"",
            think=self._options.think,
            tools=self._tools if is_first else (),
            # In a conversation the model chooses between words and a call, as on a server.
            must_call=False,
        )
        if self._memory.in_chat:
            prompt = TURN_END.encode() + prompt
        return self._tokenizer.encode(prompt)

    def answer(self, ids: list[int]) -> None:
        """Reads a turn and prints the answer; Ctrl-C ends it as the limit `--tokens` does."""
        options = self._options
        # The opening in the prompt is part of the answer.
        opening = answer_opening(options.think).lstrip()
        stream = Stream(opening, goes_on=bool(options.save_state))
        with hold_interrupt() as interrupted, stream:
            out = generate(
                self._model.module,
                self._model.params,
                ids,
                self._memory.state,
                stop_strings=self._stops,
                on_text=stream,
                should_stop=interrupted,
                **drawing(options, self._tokenizer, answers=self._answers),
            )
            self._answers += 1
            self._earlier.append(self._memory)
            self._memory = _Memory(out.state, out.logits, True)
            stream.close()
        note_ids_without_entry(self._tokenizer, out.tokens[0])

    def obey(self, command: str) -> None:
        """Runs a command, which is a line that begins with /.

        Raises:
            ValueError: the command is unknown, or cannot run now.
            OSError: a file cannot be written.
        """
        name, _, argument = command.partition(" ")
        if name == "/save":
            self._save(argument.strip())
        elif command == "/undo":
            if not self._earlier:
                raise ValueError(
                    f"`/undo` must follow an answer; it drops at most the last {_MOST_UNDOS}."
                )
            self._memory = self._earlier.pop()
            _note("the last exchange was dropped")
        elif command == "/reset":
            self._memory = self._start
            self._earlier.clear()
            _note("the conversation is back at its start")
        elif command == "/help":
            _note(_HELP)
        else:
            raise ValueError(
                f"`{command}` is not a command: /help lists them. Write a leading / as //."
            )

    def _save(self, file: str) -> None:
        """Saves the state to the file of `/save`."""
        try:
            target = state_target(file)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"`/save` {error}.") from None
        _check_target("`/save`", target, self._options)
        check_savable("`/save`", target, self._memory.state)
        if not self._write(target):
            raise ValueError("`/save` must follow an answer.")
        _note(f"{target}: the state of this conversation")

    def close(self) -> None:
        """Saves the state to the file of `--save-state`."""
        target = self._options.save_state
        if target and not self._write(target):
            _note(f"note: {target} was not written, because there was no answer.")

    def _write(self, target: str) -> bool:
        """Saves the state if it has read an answer; returns whether it has."""
        state, logits, in_chat = self._memory
        if state is None or logits is None:
            return False
        save_session(target, self._model, state, logits=logits, is_chat=in_chat)
        return True


def _talk(conversation: _Conversation, prompt: str) -> None:
    """Runs commands and answers messages until `/quit` or the end of input.

    A rejected line changes nothing.

    Args:
        conversation: the conversation.
        prompt: shown before each line.
    """
    while (message := _read_message(prompt)) is not None:
        is_command = message.startswith("/") and not message.startswith("//")
        if is_command and message.strip() == "/quit":
            return
        if not message.strip():
            continue
        try:
            if is_command:
                conversation.obey(message.strip())
                continue
            ids = conversation.encode(message.removeprefix("/"))
        except (ValueError, OSError) as error:
            _note(reason(error))
            continue
        conversation.answer(ids)


def _read_message(prompt: str) -> str | None:
    """Reads a message; a line that ends with a backslash continues. None at the end of input."""
    message = ""
    while (line := _read_line(prompt)) is not None:
        message += line
        if not line.endswith("\\"):
            return message
        message = message[:-1] + "\n"
    return message or None


def _read_line(prompt: str) -> str | None:
    """Reads a line of standard input, without the newline; None at the end of input."""
    if prompt and sys.stdout.isatty():
        try:
            return input(prompt)
        except EOFError:
            # End the line of the prompt.
            print()
            return None
    # Only answers go to standard output.
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _prepare_input() -> str:
    """Prepares standard input and returns its prompt; "" if it is not a terminal."""
    reconfigure = getattr(sys.stdin, "reconfigure", None)
    if reconfigure is not None:
        # Preserve bytes that are not UTF-8 for the model.
        reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        return ""
    with contextlib.suppress(ImportError):
        # Importing it gives `input` line editing and history.
        importlib.import_module("readline")
    _note("/help lists the commands")
    return "> "


def _note(text: str) -> None:
    """Prints text that is not part of an answer to standard error."""
    print(text, file=sys.stderr, flush=True)
