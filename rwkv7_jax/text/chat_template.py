"""World's chat template: how a conversation is written as one text.

    System: ...

    User: ...

    Assistant: ...

Turns end at a blank line. Models of the World series were trained on this layout.
"""

import re

SPEAKERS = {
    "system": "System",
    "user": "User",
    "assistant": "Assistant",
}

TURN_END = "\n\n"


def turn_start(role: str) -> str:
    """Returns what a turn begins with; its words follow after a space."""
    return f"{SPEAKERS[role]}:"


# A model that has answered goes on with the user's next message: generation ends before it.
CHAT_STOP = TURN_END + turn_start("user")


def clean_message(text: str) -> str:
    """Removes what would end a turn from inside a message: blank lines, and blanks at its ends.

    Tuning data and the messages of a chat both go through here: a model must be asked in the form
    that it was trained on.
    """
    text = text.replace("\r\n", "\n")
    return re.sub(r"\s*\n\s*\n", "\n", text).strip()


def chat_prompt(message: bytes) -> bytes:
    """Returns the prompt that asks for an answer to one message.

    Args:
        message: bytes that need not be UTF-8; `clean_message` says what is removed.
    """
    # Surrogates stand for bytes that are not UTF-8, and are no blanks.
    cleaned = clean_message(message.decode("utf-8", "surrogateescape"))
    question = (
        turn_start("user").encode() + b" " + cleaned.encode("utf-8", "surrogateescape")
    )
    return question + (TURN_END + turn_start("assistant")).encode()
