"""Checks of a request before it waits for a row."""

from rwkv7_jax.checks import check_count, check_ids
from rwkv7_jax.generation.sampling import SamplingParams, make_options
from rwkv7_jax.serving.requests import MOST_ALTERNATIVES, Request, TooLong
from rwkv7_jax.text.detokenizer import check_stop_strings


def request_options(
    request: Request,
    vocab_size: int,
    *,
    longest_prompt: int,
    longest_answer: int,
    free: SamplingParams,
) -> SamplingParams:
    """Checks a request and returns its sampling options.

    Args:
        request: the request.
        vocab_size: the vocabulary size of the model.
        longest_prompt: the maximum number of prompt tokens.
        longest_answer: the maximum number of new tokens.
        free: the options of a free row, whose masks all rows share.

    Raises:
        TooLong: the prompt has too many tokens.
        ValueError: a number is out of range, or an id is outside the vocabulary.
        TypeError: an argument has the wrong type.
    """
    check_ids(request.prompt, vocab_size, "`prompt`")
    length = len(request.prompt)
    check_count(length, 1, "the length of `prompt`")
    if length > longest_prompt:
        raise TooLong(
            f"submit: the length of `prompt` must be at most {longest_prompt}; got {length}."
        )
    check_count(request.tokens, 1, "`tokens`", most=longest_answer)
    check_count(request.seed, 0, "`seed`", most=2**63 - 1)
    if request.alternatives is not None:
        check_count(request.alternatives, 0, "`alternatives`", most=MOST_ALTERNATIVES)
    check_ids(request.stop_ids, vocab_size, "`stop_ids`")
    check_stop_strings(request.stop_strings)
    options = make_options(
        vocab_size,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        penalty_decay=request.penalty_decay,
    )
    # Share the masks: thousands of requests may wait, and a mask is as long as the vocabulary.
    return options._replace(weights=free.weights, banned=free.banned, stops=free.stops)
