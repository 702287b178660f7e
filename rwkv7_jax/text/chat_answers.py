"""Answers in RWKV-7's chat template, read as they come: thought, words, and calls of functions.

The inverse of how `chat_template` writes what an assistant says.
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
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: by their names, as JSON.
    """

    name: str
    arguments: str


class AnswerParts(NamedTuple):
    """What an answer, or the next piece of one, consists of.

    Attributes:
        thought: without blanks at its ends.
        words: outside of thoughts and calls.
        calls: of functions.
    """

    thought: str = ""
    words: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerReader:
    """A reader that takes an answer's text as it comes, and returns parts that are certain.

    The parts together do not depend on how the text was cut. A thought comes first, begins with
    `THOUGHT_BEGIN` and may be cut, also inside the mark that ends it; the words begin after it. A
    block of JSON that holds nothing but valid calls is these calls, and any other is words.

    Attributes:
        calls_read: how many calls were returned.
    """

    def __init__(self, tools: Sequence[str] = (), *, parallel: bool = True):
        """Starts before the answer's first character.

        Args:
            tools: functions that may be called, as `chat_template.tool_text` writes them.
            parallel: whether an answer may have several calls; else a block with a second one is
                words.
        """
        self.calls_read = 0
        self._functions = frozenset(parse_json(tool)["name"] for tool in tools)
        self._parallel = parallel
        # Not certain.
        self._rest = ""
        self._read = self._read_beginning
        self._thought = _Trimmed()
        # The space between the speaker and the words is not the client's; other blanks are.
        self._words = _Trimmed(begun=True)

    def push(self, text: str) -> AnswerParts:
        """Adds text and returns what it makes certain."""
        self._rest += text
        return self._advance(final=False)

    def close(self) -> AnswerParts:
        """Returns the rest, when no more text will come."""
        parts = self._advance(final=True)
        # The template has a line break between words and a call.
        blanks = "" if self.calls_read else self._words.held
        return parts._replace(words=parts.words + blanks)

    def _advance(self, *, final: bool) -> AnswerParts:
        """Reads on until nothing more is certain."""
        parts = AnswerParts()
        read = None
        while read != self._read:
            read = self._read
            parts = _joined(parts, read(final=final))
        return parts

    def _read_beginning(self, *, final: bool) -> AnswerParts:
        """Reads the mark of a thought, or finds that there is none."""
        text = self._rest.lstrip()
        if THOUGHT_BEGIN.startswith(text) and not final:
            return AnswerParts()
        if text.startswith(THOUGHT_BEGIN):
            self._rest = text.removeprefix(THOUGHT_BEGIN).removeprefix(">")
            # A thought after a thought is on a line of its own.
            self._thought.push("\n")
            self._read = self._read_thought
        else:
            self._rest = self._rest.removeprefix(" ")
            self._read = self._read_words
        return AnswerParts()

    def _read_thought(self, *, final: bool) -> AnswerParts:
        """Reads up to the mark that ends a thought; the beginning of one is held back."""
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
        """Reads words and blocks of calls; a block that is not complete is held back."""
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
        """Splits the unread text before the first possible beginning of a block of calls."""
        if final or not self._functions:
            return self._rest, ""
        text, mark, after = self._rest.partition(CALL_BEGIN)
        if mark:
            return text, mark + after
        return _split_before_mark(text, CALL_BEGIN)

    def _calls(self, block: str) -> tuple[ToolCall, ...]:
        """Reads a block of JSON; none where it is no list of valid calls, nor one of them."""
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
        """Reads the call of a function that may be called.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(entry, dict) or not entry.keys() <= {"name", "arguments"}:
            raise ValueError("no call")
        name = entry.get("name")
        arguments = entry.get("arguments", {})
        if not isinstance(name, str) or name not in self._functions:
            raise ValueError("no function that may be called")
        if not isinstance(arguments, dict):
            raise ValueError("no arguments by their names")
        text = compact_json(arguments)
        # An escape can be half of a surrogate pair, which is no text.
        text.encode()
        return ToolCall(name, text)


def read_answer(
    text: str, tools: Sequence[str] = (), *, parallel: bool = True
) -> AnswerParts:
    """Reads a complete answer, which begins after the speaker's colon; see `AnswerReader`."""
    reader = AnswerReader(tools, parallel=parallel)
    first = reader.push(text)
    last = reader.close()
    return _joined(first, last)


def _joined(first: AnswerParts, second: AnswerParts) -> AnswerParts:
    """Joins the parts of two pieces that follow each other."""
    return AnswerParts(
        first.thought + second.thought,
        first.words + second.words,
        first.calls + second.calls,
    )


class _Trimmed:
    """A text that comes in pieces; blanks at its end are held until something follows them.

    Attributes:
        held: blanks that may be the end.
    """

    def __init__(self, *, begun: bool = False):
        """Starts with nothing; blanks at the beginning are dropped unless it has begun."""
        self.held = ""
        self._begun = begun

    def push(self, text: str) -> str:
        """Adds text and returns it without the blanks that may turn out to be the end."""
        whole = self.held + text
        if not self._begun:
            whole = whole.lstrip()
        inside = whole.rstrip()
        self.held = whole[len(inside) :]
        self._begun = self._begun or bool(inside)
        return inside


def _split_before_mark(text: str, mark: str) -> tuple[str, str]:
    """Splits a text before the longest end of it with which a mark may begin."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return text[:-size], text[-size:]
    return text, ""
