"""Sessions of `generate` and `chat`: what `--save-state` writes, and `--state` goes on from."""

from jaxtyping import Array, Float

from rwkv7_jax.checkpoints import load_logits, read_sidecar, save_state
from rwkv7_jax.cli.inputs import LoadedModel
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State

# The entry of a sidecar that says what was generated.
_KIND = "session"

_CHAT = "chat"


def is_chat(path: str) -> bool:
    """Tells whether a state is that of a chat, which has read an answer but not its turn's end."""
    return read_sidecar(path).get(_KIND) == _CHAT


def logits_to_go_on(
    path: str, config: RWKV7Config, *, has_prompt: bool
) -> Float[Array, "1 V"] | None:
    """Returns the logits with which a session goes on; None where an empty text begins.

    A tuned state has read nothing, and an empty text begins after it as after none: with the end
    of the text before. In a session that id would end the text that it continues.

    Args:
        path: of the state.
        config: of the model.
        has_prompt: whether there was a prompt, which is empty.

    Raises:
        ValueError: a session without logits, or no session and no prompt.
    """
    logits = load_logits(path, config=config)
    if logits is None and (not has_prompt or _KIND in read_sidecar(path)):
        raise ValueError(
            f"generate: `--prompt` must hold a token to go on from `{path}`: it has no logits of "
            "the next token, as files of `--save-state` have."
        )
    return logits


def check_savable(argument: str, target: str | None, state: RWKV7State | None) -> None:
    """Raises where the state could not be written, before anything is generated.

    Args:
        argument: the command and the option of the target, in backticks.
        target: the path to write to; None where nothing is written.
        state: None is a model that has read nothing.
    """
    if target is None or state is None or state.upscaled is None:
        return
    if not target.endswith(".safetensors"):
        raise ValueError(
            f"{argument} of an upscaled state must end in .safetensors; got {target}."
        )


def save_session(
    path: str,
    model: LoadedModel,
    state: RWKV7State,
    *,
    logits: Float[Array, "1 V"],
    is_chat: bool,
) -> None:
    """Writes the memory after an answer, WKV and both shift states, and the next token's logits."""
    info = {
        "base_model": model.hash,
        "made_of": "a session of rwkv7",
        _KIND: _CHAT if is_chat else "text",
    }
    save_state(path, state, config=model.config, info=info, logits=logits)
