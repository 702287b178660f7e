"""The public `generate`: prompts and a state in; new tokens, their text and the new state out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Params, describe_fields
from rwkv7_jax.checks import (
    as_array,
    check_count,
    check_function,
    check_ids,
    check_model,
    check_not_intercepted,
    check_params,
    check_placed,
    is_traced,
    prefix_errors,
    typed_key,
)
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.decode_loop import Decoder, DecodeState
from rwkv7_jax.generation.streaming import (
    WATCHED_BLOCK,
    Ending,
    RowText,
    decode_with_stop_strings,
)
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, repeat
from rwkv7_jax.text.detokenizer import Vocabulary, check_stop_strings


@dataclasses.dataclass(frozen=True)
class Generation:
    """Result of `generate`, one entry for each row.

    `state` has read the prompt and exactly `tokens`: neither the token that ended the row nor a
    stop string. So a further turn continues with `generate(model, params, turn, out.state)`, and an
    answer that ended at its length with `generate(..., [], out.state, logits=out.logits)`.

    Attributes:
        tokens: new ids. Where a stop string begins inside a token, the ids that spell the rest of
            it stand in that token's place, so the text is always what the tokens spell.
        finished: "stop" (a stop id or a stop string) or "length".
        state: memory after the last of `tokens`.
        logits: for the token that would come next.
        texts: the text of `tokens`, with U+FFFD for bytes that are not UTF-8; None without a
            tokenizer.
        ended: "stop_id", "stop_string" or "length".
        stop_tokens: the stop id that ended the row; None where none did.
        drawn: every id that was drawn: `tokens` and the stop id, or in place of what a stop string
            cut off the ids up to the one that completed it.
        logps: the log-probability of each of `drawn` when it was drawn; 0 of greedy ones.
    """

    tokens: list[list[int]]
    finished: list[str]
    state: RWKV7State
    logits: Float[Array, "B V"]
    texts: list[str] | None
    ended: list[Ending]
    stop_tokens: list[int | None]
    drawn: list[list[int]] = dataclasses.field(repr=False)
    logps: list[list[float]] = dataclasses.field(repr=False)
    __repr__ = describe_fields


def generate(
    model: RWKV7,
    params: Params,
    prompts: Any,
    state: RWKV7State | None = None,
    *,
    tokens: int = 256,
    key: Array | None = None,
    temperature: sampling.Number = 1.0,
    top_p: sampling.Number = 1.0,
    top_k: sampling.Number = 0,
    presence_penalty: sampling.Number = 0.0,
    frequency_penalty: sampling.Number = 0.0,
    penalty_decay: sampling.Number = 0.996,
    penalty_exempt: sampling.Ids = (),
    banned: sampling.Ids = (),
    stop_ids: sampling.Ids = (0,),
    stop_strings: Sequence[str] = (),
    tokenizer: Vocabulary | None = None,
    on_text: Callable[[str, int], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    logits: Array | None = None,
    prefill_chunk: int = 256,
) -> Generation:
    """Continues every prompt until a stop id, a stop string or the length; rows are independent.

    Penalties come first and count new tokens only, then softmax, `top_p`, `top_k` and last
    `temperature`: the order of RWKV's official package (see `sampling`). The same key gives the
    same tokens. Programs are compiled for each batch, width of the prompt's chunks and power of two
    above `tokens`; everything else is traced.

    Args:
        model: static.
        params: the weights.
        prompts: a list of ids, or a list of such lists, of any lengths; arrays too. Begin a text
            with [0] where there is nothing else to begin with.
        state: memory to start from, of one sequence (every row starts from it) or of one for each
            row; None is a model that has read nothing. It is not changed.
        tokens: new ids of a row at most; 0 only reads the prompts.
        key: one random key, folded with the row's number, or one key for each row. Not needed at
            temperature 0.
        temperature: 0 takes the most probable token.
        top_p: probability mass to keep.
        top_k: tokens to keep; 0 for no limit.
        presence_penalty: subtracted from the logit of ids that were generated.
        frequency_penalty: subtracted once more for every time they were generated.
        penalty_decay: factor on those counts at every token.
        penalty_exempt: ids that are not counted; officially `sampling.exempt_ids(tokenizer)`.
        banned: ids that are never generated.
        stop_ids: ids that end a row; they are not part of it.
        stop_strings: strings that end a row, wherever tokens begin and end; not part of the row.
        tokenizer: needed for text: `encode` and `token_bytes` are used.
        on_text: called with a piece of text and its row as soon as it is certain; the pieces of a
            row make up its text.
        should_stop: asked every few tokens whether all rows end now, as they would if `tokens` were
            that few.
        logits: of an earlier run, together with its state; then prompts may be empty, and `[]` is
            one for each row of the state.
        prefill_chunk: tokens of a prompt that are read at once.

    Raises:
        ValueError: an argument out of its range, weights or a state that give no finite logits, or
            a call inside of `flax.linen.intercept_methods`.
        TypeError: ids that are not integers, or an argument of the wrong kind.
    """
    with prefix_errors("generate"):
        check_model(model)
        options = sampling.make_options(
            model.config.vocab_size,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            penalty_decay=penalty_decay,
            penalty_exempt=penalty_exempt,
            banned=banned,
            stop_ids=stop_ids,
        )
        if any(map(is_traced, jax.tree.leaves((params, state, logits, key)))):
            raise TypeError(
                "it must be called outside of jit, vmap and grad, because it reads tokens on the "
                "host; inside, `lax.scan` over `model.apply` decodes."
            )
        check_not_intercepted()
        check_count(tokens, 0, "`tokens`")
        check_count(prefill_chunk, 1, "`prefill_chunk`")
        check_text_options(tokenizer, stop_strings, on_text)
        if should_stop is not None:
            check_function(should_stop, "`should_stop`")
        rows = _check_prompts(
            prompts, model.config.vocab_size, allow_empty=logits is not None
        )
        # No prompt at all goes for every row of the state that is continued.
        if not len(prompts):
            rows *= max(1, getattr(state, "batch", 1))
        # Greedy decoding draws nothing, so it needs no key.
        samples = tokens > 0 and options.temperature > 0
        keys = _row_keys(key, len(rows), needed=bool(samples))
        start = _start(model, state, logits, batch=len(rows))
        # Last: the other arguments tell more about a call that mixed them up.
        check_params(params, model.config)
        check_placed(params, "`params`")
    # Before the first program runs: see `commit_like`.
    start = commit_like((params, state, logits), start)
    watched = bool(stop_strings or on_text or should_stop)
    block = min(WATCHED_BLOCK, tokens) if watched else tokens
    decoder = Decoder(model, params, keys=keys, options=options, block=block)
    # The same call reads the prompts here and, after a stop string, the tokens that a row keeps.
    start = decoder.read(start, rows, chunk=prefill_chunk)
    row_texts = [RowText(tokenizer, stop_strings) for _ in rows]
    run = decode_with_stop_strings(
        decoder,
        start,
        row_texts,
        total=tokens,
        on_text=on_text or (lambda piece, row: None),
        should_stop=should_stop or (lambda: False),
    )
    # Of type `Ending` each: every row has ended now.
    ended: list[Any] = [row.ended for row in row_texts]
    return Generation(
        tokens=[row.tokens for row in row_texts],
        finished=["length" if ending == "length" else "stop" for ending in ended],
        state=run.state,
        logits=run.logits,
        texts=None if tokenizer is None else [row.text for row in row_texts],
        ended=ended,
        stop_tokens=[row.stop_token for row in row_texts],
        drawn=[row.drawn for row in row_texts],
        logps=[row.logps for row in row_texts],
    )


def check_text_options(tokenizer: Any, stop_strings: Any, on_text: Any = None) -> None:
    """Checks the options of `generate` that are about text.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: an empty stop string, or no tokenizer for what needs one.
    """
    check_stop_strings(stop_strings)
    if on_text is not None:
        check_function(on_text, "`on_text`")
    if tokenizer is not None and not hasattr(tokenizer, "token_bytes"):
        raise TypeError(
            f"`tokenizer` must be a Tokenizer; got {type(tokenizer).__name__}."
        )
    if tokenizer is None and (stop_strings or on_text):
        name = "stop_strings" if stop_strings else "on_text"
        raise ValueError(f"`tokenizer` must be given with `{name}`; got None.")


def _check_prompts(
    prompts: Any, vocab_size: int, *, allow_empty: bool
) -> list[list[int]]:
    """Returns the prompts as a list of rows."""
    is_list = isinstance(prompts, Sequence | np.ndarray | jax.Array)
    if isinstance(prompts, str | bytes) or not is_list:
        kind = type(prompts).__name__
        raise TypeError(f"`prompts` must be ids, as from a tokenizer; got {kind}.")
    if getattr(prompts, "shape", None) == ():
        raise ValueError("`prompts` must be a list of ids; got shape ().")
    # One prompt is a flat list of ids.
    nested = len(prompts) > 0 and _is_row(prompts[0])
    rows: list[list[int]] = []
    for index, ids in enumerate(prompts if nested else [prompts]):
        argument = f"`prompts` row {index}" if nested else "`prompts`"
        row = check_ids(ids, vocab_size, argument).tolist()
        if not row and not allow_empty:
            raise ValueError(
                f"{argument} must hold an id ([0] begins a text) unless `logits` are given; got 0."
            )
        rows.append(row)
    return rows


def _is_row(ids: Any) -> bool:
    """Tells whether the first of the prompts is a prompt, and not an id."""
    return isinstance(ids, Sequence) or np.ndim(ids) > 0


def _row_keys(key: Array | None, batch: int, *, needed: bool) -> Array:
    """Returns one typed key for each row."""
    if key is None:
        if needed:
            raise ValueError("`key` must be given unless `temperature` is 0; got None.")
        # It is never drawn with, but the compiled loop has the argument.
        key = jax.random.key(0)
    key = typed_key(key)
    if key.ndim == 0:
        # By the row's number, so that a row does not depend on how many others there are.
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"`key` must be one key or {batch}; got shape {key.shape}.")
    return key


def _start(
    model: RWKV7,
    state: Any,
    logits: Any,
    *,
    batch: int,
) -> DecodeState:
    """Makes the state of every row before its prompt."""
    config = model.config
    if state is None:
        state = init_state(config)
    # Whatever is no state is refused by `check_state`, so its batch does not matter here.
    one_for_all = getattr(state, "batch", batch) == 1
    check_state(state, 1 if one_for_all else batch, config)
    if one_for_all:
        state = repeat(state, batch)
    # As the model returns them: a loop's carry must keep its types.
    state = state.replace(
        att_shift=state.att_shift.astype(config.dtype),
        ffn_shift=state.ffn_shift.astype(config.dtype),
    )
    shape = (batch, config.vocab_size)
    if logits is None:
        logits = jnp.zeros(shape, jnp.float32)
    logits = jnp.asarray(as_array(logits, "`logits`"), jnp.float32)
    if logits.shape not in (shape, (1, config.vocab_size)):
        raise ValueError(f"`logits` must have shape {shape}; got {logits.shape}.")
    return DecodeState.create(state, jnp.broadcast_to(logits, shape))


def commit_like(arrays: Any, fresh: Any) -> Any:
    """Commits `fresh` to the device of the first committed array, to avoid a second compilation.

    Outputs of a program with a committed input are committed. A program that was compiled for
    uncommitted arrays would be compiled once more for them.
    """
    for array in jax.tree.leaves(arrays):
        committed = getattr(array, "committed", False)
        if committed and isinstance(array.sharding, SingleDeviceSharding):
            return jax.device_put(fresh, array.sharding)
    return fresh
