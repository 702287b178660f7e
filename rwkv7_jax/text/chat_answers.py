"""A streaming parser for answers in RWKV-7's chat template: thoughts, words and function calls.

The inverse of how `chat_template` writes assistant turns.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv7_jax.json_files import parse_json
from rwkv7_jax.text.chat_template import (
    CALL_BEGIN,
    CALL_END,
    THOUGHT_BEGIN,
    THOUGHT_END,
    compact_json,
)

_THOUGHT_MARK = THOUGHT_END.strip()


class ToolCall(NamedTuple):
    """A function call.

    Attributes:
        name: name of the function.
        arguments: arguments by name, as JSON.
    """

    name: str
    arguments: str


class AnswerParts(NamedTuple):
    """The parts of an answer, or of the next piece of one.

    Attributes:
        thought: thoughts, without surrounding whitespace.
        words: text outside thoughts and calls.
        calls: function calls.
    """

    thought: str = ""
    words: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerReader:
    """An incremental parser that returns the parts of an answer as soon as they are certain.

    The joined parts do not depend on how the text is split into pieces. A thought starts with
    `THOUGHT_BEGIN` and precedes the words; it may be truncated, even inside its end mark. A JSON
    block that holds only valid calls is parsed as calls; any other block is words.

    Attributes:
        calls_read: number of calls returned so far.
    """

    def __init__(self, tools: Sequence[str] = (), *, parallel: bool = True):
        """Starts before the answer's first character.

        Args:
            tools: the available functions, as `chat_template.tool_text` writes them.
            parallel: whether an answer may have several calls; if not, a block with a second call
                is words.
        """
        self.calls_read = 0
        self._functions = frozenset(parse_json(tool)["name"] for tool in tools)
        self._parallel = parallel
        # The text that is not certain yet.
        self._rest = ""
        self._read = self._read_beginning
        self._thought = _Trimmed()
        # The one space after the speaker's colon is dropped; other leading whitespace is kept.
        self._words = _Trimmed(begun=True)

    def push(self, text: str) -> AnswerParts:
        """Adds text and returns the parts that it makes certain."""
        self._rest += text
        return self._advance(final=False)

    def close(self) -> AnswerParts:
        """Ends the answer and returns the rest."""
        parts = self._advance(final=True)
        # The template puts a line break between words and a call.
        blanks = "" if self.calls_read else self._words.held
        return parts._replace(words=parts.words + blanks)

    def _advance(self, *, final: bool) -> AnswerParts:
        """Parses until nothing more is certain."""
        parts = AnswerParts()
        read = None
        while read != self._read:
            read = self._read
            parts = _joined(parts, read(final=final))
        return parts

    def _read_beginning(self, *, final: bool) -> AnswerParts:
        """Parses the begin mark of a thought, or determines that there is none."""
        text = self._rest.lstrip()
        if THOUGHT_BEGIN.startswith(text) and not final:
            return AnswerParts()
        if text.startswith(THOUGHT_BEGIN):
            self._rest = text.removeprefix(THOUGHT_BEGIN).removeprefix(">")
            # A second thought starts on a new line.
            self._thought.push("\n")
            self._read = self._read_thought
        else:
            self._rest = self._rest.removeprefix(" ")
            self._read = self._read_words
        return AnswerParts()

    def _read_thought(self, *, final: bool) -> AnswerParts:
        """Parses up to the end mark of a thought; holds back a possible beginning of the mark."""
        del final
        text, mark, rest = self._rest.partition(_THOUGHT_MARK)
        if mark:
            self._rest = rest
            self._words = _Trimmed()
            self._read = self._read_beginning
        else:
            text, self._rest = _split_before_mark(text, _THOUGHT_MARK)
        return AnswerParts(self._thought.push(text))

    def _read_words(self, *, final: bool) -> AnswerParts:
        """Parses words and blocks of calls; holds back an incomplete block."""
        words = ""
        calls: list[ToolCall] = []
        while self._functions:
            text, mark, after = self._rest.partition(CALL_BEGIN)
            block, end, rest = after.partition(CALL_END)
            if not mark or not (end or final):
                break
            words += self._words.push(text)
            found = self._calls(block)
            if found:
                calls.extend(found)
                self.calls_read += len(found)
                self._rest = rest
            else:
                words += self._words.push(mark)
                self._rest = after
        text, self._rest = self._certain_words(final=final)
        words += self._words.push(text)
        return AnswerParts(words=words, calls=tuple(calls))

    def _certain_words(self, *, final: bool) -> tuple[str, str]:
        """Splits the unread text before the first possible begin mark of a block of calls."""
        if final or not self._functions:
            return self._rest, ""
        text, mark, after = self._rest.partition(CALL_BEGIN)
        if mark:
            return text, mark + after
        return _split_before_mark(text, CALL_BEGIN)

    def _calls(self, block: str) -> tuple[ToolCall, ...]:
        """Parses a JSON block; empty unless it is a valid call or a list of valid calls."""
        try:
            value = parse_json(block)
            entries = value if isinstance(value, list) else [value]
            calls = [self._call(entry) for entry in entries]
        except ValueError:
            return ()
        if not self._parallel and self.calls_read + len(calls) > 1:
            return ()
        return tuple(calls)

    def _call(self, entry: Any) -> ToolCall:
        """Parses a call of an available function.

        Raises:
            ValueError: it is not such a call.
        """
        if not isinstance(entry, dict) or not entry.keys() <= {"name", "arguments"}:
            raise ValueError("not a call")
        name = entry.get("name")
        arguments = entry.get("arguments", {})
        if not isinstance(name, str) or name not in self._functions:
            raise ValueError("not an available function")
        if not isinstance(arguments, dict):
            raise ValueError("arguments not by name")
        text = compact_json(arguments)
        # Raises if an escape is a lone surrogate, which has no UTF-8.
        text.encode()
        return ToolCall(name, text)


def read_answer(
    text: str, tools: Sequence[str] = (), *, parallel: bool = True
) -> AnswerParts:
    """Parses a complete answer, which begins after the speaker's colon; see `AnswerReader`."""
    reader = AnswerReader(tools, parallel=parallel)
    first = reader.push(text)
    last = reader.close()
    return _joined(first, last)


def _joined(first: AnswerParts, second: AnswerParts) -> AnswerParts:
    """Joins the parts of two consecutive pieces."""
    return AnswerParts(
        first.thought + second.thought,
        first.words + second.words,
        first.calls + second.calls,
    )


class _Trimmed:
    """A text in pieces; trailing whitespace is held back until something follows it.

    Attributes:
        held: whitespace that may be trailing.
    """

    def __init__(self, *, begun: bool = False):
        """Starts empty; leading whitespace is dropped unless the text has already begun."""
        self.held = ""
        self._begun = begun

    def push(self, text: str) -> str:
        """Adds text and returns it without whitespace that may be trailing."""
        whole = self.held + text
        if not self._begun:
            whole = whole.lstrip()
        inside = whole.rstrip()
        self.held = whole[len(inside) :]
        self._begun = self._begun or bool(inside)
        return inside


def _split_before_mark(text: str, mark: str) -> tuple[str, str]:
    """Splits a text before its longest suffix that is a prefix of the mark."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return text[:-size], text[-size:]
    return text, ""
