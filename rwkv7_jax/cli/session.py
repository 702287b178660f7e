"""Sessions of `generate` and `chat`, which `--save-state` writes and `--state` resumes."""

from jaxtyping import Array, Float

from rwkv7_jax.checkpoints import load_logits, read_sidecar, save_state
from rwkv7_jax.cli.inputs import LoadedModel
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State

# The sidecar's key for the kind of session.
_KIND = "session"

_CHAT = "chat"


def is_chat(path: str) -> bool:
    """Tells whether a state is from a chat: after an answer, before the end of its turn."""
    return read_sidecar(path).get(_KIND) == _CHAT


def logits_to_go_on(
    path: str, config: RWKV7Config, *, has_prompt: bool
) -> Float[Array, "1 V"] | None:
    """Returns the logits from which a session continues; None for a new text.

    With an empty prompt, a new text starts from a tuned state with the end-of-text id. In a
    session, that id would end the text to continue, so the session needs the next token's logits.

    Args:
        path: path of the state.
        config: config of the model.
        has_prompt: whether a prompt was given; it is empty.

    Raises:
        ValueError: the session has no logits; or the state is no session, and no prompt was given.
    """
    logits = load_logits(path, config=config)
    if logits is None and (not has_prompt or _KIND in read_sidecar(path)):
        raise ValueError(
            f"generate: `--prompt` must hold a token to continue from `{path}`, because the file "
            "has no logits of the next token; files of `--save-state` have them."
        )
    return logits


def check_savable(argument: str, target: str | None, state: RWKV7State | None) -> None:
    """Checks, before anything is generated, that the format can hold the state.

    Args:
        argument: the command and the option of the target, in backticks.
        target: the path to write to; None if nothing is written.
        state: the start state; None for zeros.

    Raises:
        ValueError: the state is upscaled and the target is not .safetensors.
    """
    if target is None or state is None or state.upscaled is None:
        return
    if not target.endswith(".safetensors"):
        raise ValueError(
            f"{argument} must end in .safetensors for an upscaled state; got {target}."
        )


def save_session(
    path: str,
    model: LoadedModel,
    state: RWKV7State,
    *,
    logits: Float[Array, "1 V"],
    is_chat: bool,
) -> None:
    """Writes the whole state after an answer, and the next token's logits."""
    info = {
        "base_model": model.hash,
        "made_of": "a session of rwkv7",
        _KIND: _CHAT if is_chat else "text",
    }
    save_state(path, state, config=model.config, info=info, logits=logits)
