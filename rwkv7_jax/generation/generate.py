"""The public function `generate`: takes prompts and a state, returns new tokens, text and state."""

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
    check_tokenizer,
    is_traced,
    prefix_errors,
    typed_key,
)
from rwkv7_jax.generation import sampling
from rwkv7_jax.generation.decode_loop import Decoder, DecodeState
from rwkv7_jax.generation.prefill import default_chunk
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
    """The result of `generate`; every field has one entry per row.

    `state` has read the prompt and exactly `tokens`, neither a stop id nor a stop string. Continue
    with another turn by `generate(model, params, turn, out.state)`. Resume an answer that ended at
    its length limit by `generate(..., [], out.state, logits=out.logits)`.

    Attributes:
        tokens: new ids. If a stop string begins inside a token, ids for the part before it replace
            that token, so that the tokens decode to the text.
        finished: "stop" (a stop id or a stop string) or "length".
        state: the state after the last of `tokens`.
        logits: logits of the next token.
        texts: the text of `tokens`, with U+FFFD for bytes that are not UTF-8; None without a
            tokenizer.
        ended: "stop_id", "stop_string" or "length".
        stop_tokens: the stop id that ended the row; None if none did.
        drawn: every sampled id: `tokens` and the stop id, or all ids up to the one that completed a
            stop string.
        logps: the log-probability of each id in `drawn` when it was sampled; 0 if greedy.
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
    prefill_chunk: int | None = None,
) -> Generation:
    """Continues each prompt up to a stop id, a stop string or the length limit.

    Rows are independent, and the same key gives the same tokens. Sampling applies, in the order of
    RWKV's official package (see `sampling`): penalties, which count only new tokens; softmax;
    `top_p`; `top_k`; `temperature`. Programs are compiled per batch size, prompt chunk width and
    power of two above `tokens`; all other arguments are traced.

    Args:
        model: the model (static).
        params: the weights.
        prompts: a list or array of ids, or a list of them, of any lengths. Use [0] to begin a text
            from nothing.
        state: the state to start from, either one for all rows or one per row; None for the zero
            state. It is not modified.
        tokens: maximum number of new tokens per row; 0 only prefills.
        key: one random key, which is folded with the row's index, or one key per row. Not needed at
            temperature 0.
        temperature: sampling temperature; 0 is greedy.
        top_p: probability mass to keep.
        top_k: number of tokens to keep; 0 for no limit.
        presence_penalty: subtracted from the logit of each id that was generated.
        frequency_penalty: subtracted again for every time that the id was generated.
        penalty_decay: factor on those counts at every token.
        penalty_exempt: ids that are not counted; officially `sampling.exempt_ids(tokenizer)`.
        banned: ids that are never generated.
        stop_ids: ids that end a row and are not part of it.
        stop_strings: stop sequences that end a row and are not part of it; they may span tokens.
        tokenizer: required for text; `encode` and `token_bytes` are used.
        on_text: called with each piece of text and its row once it is certain; the pieces of a row
            join to its text.
        should_stop: called every few tokens; if it returns true, all rows end as at the length
            limit.
        logits: the logits of an earlier run, passed with its state. Prompts may then be empty, and
            `[]` is an empty prompt for every row of the state.
        prefill_chunk: number of prompt tokens of each row that are read at once; None for 256 on a
            CPU, and elsewhere for 4,096 over all rows, if that is more.

    Raises:
        ValueError: an argument is out of range, the logits are not finite, or it is called inside
            `flax.linen.intercept_methods`.
        TypeError: ids are not integers, or an argument has the wrong type.
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
                "it must be called outside jit, vmap and grad, because it reads tokens on the "
                "host; inside them, decode with `lax.scan` over `model.apply`."
            )
        check_not_intercepted()
        check_count(tokens, 0, "`tokens`")
        if prefill_chunk is not None:
            check_count(prefill_chunk, 1, "`prefill_chunk`")
        check_text_options(tokenizer, stop_strings, on_text)
        if should_stop is not None:
            check_function(should_stop, "`should_stop`")
        rows = _check_prompts(
            prompts, model.config.vocab_size, allow_empty=logits is not None
        )
        # `[]` is an empty prompt for every row of the state.
        if not len(prompts):
            rows *= max(1, getattr(state, "batch", 1))
        # Greedy decoding needs no key.
        samples = tokens > 0 and options.temperature > 0
        keys = _row_keys(key, len(rows), needed=bool(samples))
        start = _start(model, state, logits, batch=len(rows))
        # Checked last: if arguments were mixed up, the errors of the others say more.
        check_params(params, model.config)
        check_placed(params, "`params`")
    # Before the first program runs: see `commit_like`.
    start = commit_like((params, state, logits), start)
    watched = bool(stop_strings or on_text or should_stop)
    block = min(WATCHED_BLOCK, tokens) if watched else tokens
    decoder = Decoder(model, params, keys=keys, options=options, block=block)
    chunk = prefill_chunk or default_chunk(len(rows))
    start = decoder.read(start, rows, chunk=chunk)
    row_texts = [RowText(tokenizer, stop_strings) for _ in rows]
    run = decode_with_stop_strings(
        decoder,
        start,
        row_texts,
        total=tokens,
        on_text=on_text or (lambda piece, row: None),
        should_stop=should_stop or (lambda: False),
    )
    # Every row has ended, so each entry is an `Ending`.
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
    """Checks the text options of `generate`.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: a stop string is empty, or an option needs a tokenizer and there is none.
    """
    check_stop_strings(stop_strings)
    if on_text is not None:
        check_function(on_text, "`on_text`")
    if tokenizer is not None:
        check_tokenizer(tokenizer, "token_bytes")
    elif stop_strings or on_text:
        name = "stop_strings" if stop_strings else "on_text"
        raise ValueError(f"`tokenizer` must be given with `{name}`; got None.")


def _check_prompts(
    prompts: Any, vocab_size: int, *, allow_empty: bool
) -> list[list[int]]:
    """Checks the prompts and returns them as a list of rows."""
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
    """Returns whether the first entry of the prompts is a prompt rather than an id."""
    return isinstance(ids, Sequence) or np.ndim(ids) > 0


def _row_keys(key: Array | None, batch: int, *, needed: bool) -> Array:
    """Returns one typed key per row."""
    if key is None:
        if needed:
            raise ValueError("`key` must be given unless `temperature` is 0; got None.")
        # A dummy: the compiled loop takes keys even if it does not use them.
        key = jax.random.key(0)
    key = typed_key(key)
    if key.ndim == 0:
        # Folded with the row's index, so that a row does not depend on the batch size.
        return sampling.fold_keys(key, jnp.arange(batch))
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
    """Builds the decode state of every row before its prompt."""
    config = model.config
    if state is None:
        state = init_state(config)
    # `check_state` rejects anything that is not a state.
    one_for_all = getattr(state, "batch", batch) == 1
    check_state(state, 1 if one_for_all else batch, config)
    if one_for_all:
        state = repeat(state, batch)
    # The dtypes that the model returns, because a loop's carry must keep its types.
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

    The outputs of a program with a committed input are committed, and a program that was compiled
    for uncommitted arrays would be compiled again for them.
    """
    for array in jax.tree.leaves(arrays):
        committed = getattr(array, "committed", False)
        if committed and isinstance(array.sharding, SingleDeviceSharding):
            return jax.device_put(fresh, array.sharding)
    return fresh
