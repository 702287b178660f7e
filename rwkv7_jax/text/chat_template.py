"""World's chat template: how a conversation is written as one text.

    System: ...

    User: ...

    Assistant: ...

Turns end at a blank line. Models of the World series were trained on this layout.
"""

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


def chat_prompt(message: bytes) -> bytes:
    """Returns the prompt that asks for an answer to one message.

    Args:
        message: bytes that need not be UTF-8; blanks at its ends are removed.
    """
    question = turn_start("user").encode() + b" " + message.strip()
    return question + (TURN_END + turn_start("assistant")).encode()
