"""Sessions of `rwkv7 generate`: what `--save-state` writes, and `--state` goes on from."""

import argparse

from jaxtyping import Array, Float

from rwkv7_jax.checkpoints import load_logits, read_sidecar, save_state
from rwkv7_jax.cli.inputs import LoadedModel
from rwkv7_jax.generation.generate import Generation
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


def check_savable(options: argparse.Namespace, state: RWKV7State) -> None:
    """Raises where `--save-state` could not write the state, before anything is generated."""
    if not options.save_state or state.upscaled is None:
        return
    if not options.save_state.endswith(".safetensors"):
        raise ValueError(
            "generate: `--save-state` of an upscaled state must end in .safetensors; "
            f"got {options.save_state}."
        )


def save_session(
    path: str, model: LoadedModel, out: Generation, *, is_chat: bool
) -> None:
    """Writes the memory after an answer, WKV and both shift states, and the next token's logits."""
    info = {
        "base_model": model.hash,
        "made_of": "a session of rwkv7 generate",
        _KIND: _CHAT if is_chat else "text",
    }
    save_state(path, out.state, config=model.config, info=info, logits=out.logits)
