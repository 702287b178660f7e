"""Laws of sampling: the official order and distribution, no NaN, rows on their own."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.checks import check_count, check_ids
from rwkv7_jax.generation import sampling

VOCAB = 97


def random_logits(seed: int = 0, rows: int = 1) -> jax.Array:
    return 3 * jax.random.normal(jax.random.key(seed), (rows, VOCAB))


_compiled = jax.jit(sampling.log_probabilities)
sample = jax.jit(sampling.sample_with_logp)


def probabilities(logits, *, temperature, top_p=1.0, top_k=0) -> np.ndarray:
    logp = _compiled(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    return np.exp(np.asarray(logp))


@pytest.fixture(scope="module")
def official():
    """The distribution that the official package draws from, caught where it draws."""
    pytest.importorskip("torch", reason="the oracle extra is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip(
            "rwkv.utils", reason="the oracle extra is not installed"
        )
        import torch

    def distribution(logits, **choices):
        caught = {}

        def choice(a, p):
            caught["p"] = np.array(p)
            return 0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils.np.random, "choice", choice)
            utils.PIPELINE.sample_logits(
                None, torch.tensor(np.array(logits)), **choices
            )
        return caught["p"]

    return distribution


@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB + 3])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.85, 0.999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_distribution_matches_the_official_package(
    official, temperature, top_p, top_k
):
    for seed in range(3):
        logits = random_logits(seed)
        theirs = official(logits[0], temperature=temperature, top_p=top_p, top_k=top_k)
        ours = probabilities(
            logits, temperature=temperature, top_p=top_p, top_k=min(top_k, VOCAB)
        )
        np.testing.assert_array_equal(ours[0] > 0, theirs > 0)
        np.testing.assert_allclose(ours[0], theirs, atol=2e-6)


def test_the_cutoff_search_by_three_bits_matches_the_search_by_one(monkeypatch):
    # Whole numbers, of which some are equal; a row with a single likely token.
    logits = jnp.round(random_logits(rows=5)).at[4, 7].set(40.0)

    def cuts(platform):
        monkeypatch.setattr(sampling.platforms, "target_platform", lambda: platform)
        # A function of its own, which is traced for this platform.
        search = jax.jit(lambda top_p, top_k: distribution(logits, top_p, top_k))
        found = []
        for top_p in (0.0, 0.3, 0.9, 0.9999, 1.0):
            for top_k in (0, 1, 5, VOCAB):
                found.append(np.isfinite(search(top_p, top_k)))
        return found

    def distribution(logits, top_p, top_k):
        return sampling.log_probabilities(
            logits, temperature=1.0, top_p=top_p, top_k=top_k
        )

    np.testing.assert_array_equal(cuts("cuda"), cuts("cpu"))


def test_top_p_uses_the_probabilities_at_temperature_one():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    for temperature in (0.1, 1.0, 10.0):
        kept = probabilities(logits, temperature=temperature, top_p=0.75) > 0
        np.testing.assert_array_equal(kept, [[True, True, False]])


def test_top_p_that_is_reached_exactly_needs_no_further_token_unless_it_is_1():
    mask = jax.jit(sampling._top_p_mask)
    kept = mask(jnp.array([[0.5, 0.25, 0.125, 0.125]]), 0.75)
    np.testing.assert_array_equal(kept, [[True, True, False, False]])
    assert mask(jnp.array([[1.0, 1e-18, 0.0, 0.0]]), 1.0).all()


def test_top_p_0_keeps_the_most_probable_token():
    logits = random_logits(rows=5)
    kept = probabilities(logits, temperature=1.0, top_p=0.0) > 0
    np.testing.assert_array_equal(kept.sum(axis=1), 1)
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


def test_top_p_1_keeps_every_token_despite_rounding():
    for top_k in (0, VOCAB):
        kept = (
            probabilities(
                random_logits(rows=5), temperature=1.0, top_p=1.0, top_k=top_k
            )
            > 0
        )
        assert kept.all()


def test_ties_at_the_cutoff_stay_and_top_k_prefers_lower_ids():
    logits = jnp.array([[0.0, 1.0, 1.0, 1.0, 0.0]])
    kept = probabilities(logits, temperature=1.0, top_p=0.1) > 0
    np.testing.assert_array_equal(kept, [[False, True, True, True, False]])
    kept = probabilities(logits, temperature=1.0, top_k=2) > 0
    np.testing.assert_array_equal(kept, [[False, True, True, False, False]])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-4, 1.0, 1e30])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e38])
def test_every_temperature_gives_probabilities(temperature, scale):
    logits = jnp.clip(scale * random_logits(rows=5), -1e30, 1e30).at[:, 3].set(-jnp.inf)
    for top_p, top_k in ((0.0, 0), (0.5, 3), (1.0, 0)):
        probs = probabilities(logits, temperature=temperature, top_p=top_p, top_k=top_k)
        np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
        assert (probs[:, 3] == 0).all()


def test_temperature_0_takes_the_first_largest_logit():
    # Whole numbers, of which some are equal.
    logits = jnp.round(random_logits(rows=5))
    options = sampling.make_options(VOCAB, temperature=0, top_p=0.5)
    drawn, _ = sample(jax.random.split(jax.random.key(0), 5), logits, options)
    np.testing.assert_array_equal(drawn, logits.argmax(axis=1))
    probs = probabilities(logits, temperature=0.0)
    np.testing.assert_array_equal(probs.argmax(axis=1), drawn)
    np.testing.assert_array_equal(probs.max(axis=1), 1)


def test_draws_follow_the_distribution():
    logits = jnp.broadcast_to(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (4000, 4))
    options = sampling.make_options(4, temperature=1.0, top_p=0.9)
    drawn, _ = sample(jax.random.split(jax.random.key(1), 4000), logits, options)
    shares = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([50, 30, 15, 0]) / 95, atol=0.03)


def test_a_row_depends_only_on_its_own_key():
    logits = random_logits(rows=5)
    keys = jax.random.split(jax.random.key(2), 5)
    options = sampling.make_options(VOCAB, temperature=1.3, top_p=0.95)
    together, _ = sample(keys, logits, options)
    for row in range(5):
        alone, _ = sample(keys[row : row + 1], logits[row : row + 1], options)
        assert alone[0] == together[row]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_per_row_options_match_single_rows(monkeypatch, platform):
    # One by one on a CPU, together elsewhere.
    monkeypatch.setattr(sampling.platforms, "target_platform", lambda: platform)
    choices = [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.0, "top_p": 0.0},
        {"temperature": 0.9},
    ]
    logits = random_logits(rows=len(choices))
    keys = jax.random.split(jax.random.key(3), len(choices))
    options = [sampling.make_options(VOCAB, **own) for own in choices]
    ids, logps = sampling.sample_with_logp(
        keys, logits, sampling.options_by_row(options)
    )
    for row, own in enumerate(options):
        alone = sampling.sample_with_logp(keys[row : row + 1], logits[row][None], own)
        assert ids[row] == alone[0][0]
        np.testing.assert_allclose(logps[row], alone[1][0], atol=1e-6)
    assert logps[0] == 0 and logps[1] < 0


def test_penalties_count_decay_and_skip_exempt_tokens():
    options = sampling.make_options(
        5,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        penalty_decay=0.5,
        penalty_exempt=[2],
        banned=[4],
    )
    seen = sampling.no_occurrences(1, 5)
    for token in (1, 1, 2):
        seen = sampling.count(seen, jnp.array([token]), options)
    # Token 1 was counted once and once more a step later, then all counts halved: (0.5 + 1) / 2.
    expected = [[0, -(0.25 + 0.5 * 0.75), -0.25, 0, -np.inf]]
    np.testing.assert_allclose(
        sampling.apply_penalties(jnp.zeros((1, 5)), seen, options), expected
    )


@pytest.mark.parametrize("size", [-3e38, 3e38])
def test_huge_penalties_leave_a_distribution(size):
    options = sampling.make_options(
        VOCAB, presence_penalty=size, frequency_penalty=size
    )
    seen = jnp.ones((1, VOCAB), bool)
    counts = jnp.arange(float(VOCAB))[None]
    logits = sampling.apply_penalties(
        random_logits(), sampling.Occurrences(seen, counts), options
    )
    assert np.isfinite(np.asarray(logits)).all()
    drawn, _ = sample(jax.random.split(jax.random.key(0), 1), logits, options)
    assert 0 <= drawn[0] < VOCAB


class Words:
    """A vocabulary with a few entries of more than one byte."""

    entries = ("1", "12", " \t", "a1", "123456789", "21", "\t0", " ")

    def encode(self, text):
        return [self.entries.index(text)] if text in self.entries else [0, 0]

    def token_bytes(self, token):
        return self.entries[token].encode()


def test_exempt_ids_have_texts_within_the_official_string():
    assert sampling.exempt_ids(Words()) == (0, 1, 2, 4, 6, 7)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"temperature": -1}, "make_options: `temperature` must be from 0 to"),
        ({"temperature": float("nan")}, "`temperature` must be from 0 to"),
        ({"top_p": 1.5}, "`top_p` must be from 0 to 1; got 1.5."),
        ({"top_k": -1}, "`top_k` must be at least 0; got -1."),
        ({"presence_penalty": float("inf")}, "`presence_penalty` must be"),
        ({"banned": range(VOCAB)}, "`banned` must leave one id; got all 97."),
        ({"banned": [3, VOCAB]}, "`banned` must hold ids .* got 97 at position 1."),
        (
            {"stop_ids": [-1]},
            "`stop_ids` must hold ids at least 0 and below 97; got -1 at",
        ),
        (
            {"penalty_exempt": np.array([[1, 2]])},
            "`penalty_exempt` must be a flat list of ids",
        ),
    ],
)
def test_options_out_of_range_are_rejected_in_one_sentence(choices, message):
    with pytest.raises(ValueError, match=message) as caught:
        sampling.make_options(VOCAB, **choices)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: check_ids([1.5], 9, "f: `x`"),
            "f: `x` must hold integers; got float64.",
        ),
        (lambda: check_ids(["a"], 9, "f: `x`"), "f: `x` must hold integers; got <U1."),
        (
            lambda: check_count(1.5, 0, "f: `x`"),
            "f: `x` must be an integer; got float.",
        ),
    ],
)
def test_non_integer_values_are_rejected_in_one_sentence(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "choices",
    [{"temperature": "hot"}, {"top_k": "a"}, {"banned": [1.5]}, {"stop_ids": ["a"]}],
)
def test_options_of_the_wrong_type_are_rejected(choices):
    with pytest.raises(TypeError):
        sampling.make_options(VOCAB, **choices)
