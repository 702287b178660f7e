"""Comparison with llama.cpp (the wheel `xllamacpp`, on CPU) on our GGUF files."""

import dataclasses
import json
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_scale_models as calm_models
from genuine_checkpoints import TINY, genuine
from random_checkpoints import random_params
from run_programs import ROOT

from rwkv7_jax.checkpoints.model_files import load_model, save_model
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.text.chat_template import chat_prompt
from rwkv7_jax.text.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the gguf extra is not installed")
xllamacpp = pytest.importorskip("xllamacpp", reason="the oracle extra is not installed")

# Of log-probabilities between 0 and -30. llama.cpp rounds the activations too where the weights
# are half precision, we do not.
FLOAT32, FLOAT16, BFLOAT16 = 2e-5, 1e-2, 1e-1
LENGTH = 40
SLOW = pytest.mark.slow


def serve(path):
    """Serve a file until the last reference to the server is gone."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0
    return xllamacpp.Server(params)


def theirs(server, ids, vocab_size) -> np.ndarray:
    """Return llama.cpp's log-probabilities of every next id."""
    answer = server.handle_completions(
        {
            "prompt": [int(number) for number in ids],
            "n_predict": 1,
            "temperature": 0,
            "n_probs": vocab_size,
            "post_sampling_probs": False,
        }
    )
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    result = np.full(vocab_size, np.nan)
    for entry in found:
        result[entry["id"]] = entry["logprob"]
    return result


def ours(params, config, ids) -> np.ndarray:
    """Return our log-probabilities in float32."""
    model = RWKV7(dataclasses.replace(config, implementation="scan"))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    logits, _ = jax.jit(model.apply)(
        {"params": wide}, jnp.asarray(ids)[None], init_state(config)
    )
    return np.asarray(jax.nn.log_softmax(logits[0, -1]))


def some_ids(config) -> np.ndarray:
    return np.random.default_rng(0).integers(1, config.vocab_size, LENGTH)


def letters(vocab_size) -> Tokenizer:
    """A vocabulary for random ids."""
    entries = {number: bytes([number]) for number in range(1, vocab_size)}
    return Tokenizer(entries, vocab_size=vocab_size, name="letters")


@pytest.mark.parametrize(
    "head_size",
    [32, 64, pytest.param(96, marks=SLOW), pytest.param(128, marks=SLOW)],
)
def test_a_random_model_matches(tmp_path, head_size):
    width = 192 if head_size == 96 else 128
    config = calm_models.config(head_size, width=width)
    params = calm_models.calm(config)
    vocabulary = letters(config.vocab_size)
    save_model(tmp_path / "m.gguf", params, config, tokenizer=vocabulary)
    ids = some_ids(config)
    expected = ours(params, config, ids)
    assert 0.5 < expected.std() < 2
    found = theirs(serve(tmp_path / "m.gguf"), ids, config.vocab_size)
    assert np.abs(found - expected).max() <= FLOAT32


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("float32", FLOAT32),
        pytest.param("float16", FLOAT16, marks=SLOW),
        ("bfloat16", BFLOAT16),
    ],
)
def test_the_bundled_model_matches(tmp_path, dtype, tolerance):
    params, config = load_model(ROOT / "assets" / "tiny.pth", dtype=dtype)
    save_model(tmp_path / "m.gguf", params, config)
    ids = some_ids(config)
    expected = ours(params, config, ids)
    found = theirs(serve(tmp_path / "m.gguf"), ids, config.vocab_size)
    assert np.abs(found - expected).max() <= tolerance
    assert found.argmax() == expected.argmax()


def test_a_published_model_matches_rwkv_cpp(tmp_path):
    params, config = load_model(genuine(TINY), dtype="float32")
    save_model(tmp_path / "m.gguf", params, config)
    ids = [34, 105, 110]
    found = theirs(serve(tmp_path / "m.gguf"), ids, 256)
    # What rwkv.cpp's own tests expect of this model.
    logits = np.fromfile(genuine(TINY).with_name("expected-logits-7v0-834K.bin"), "<f4")
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert np.abs(found - expected).max() <= FLOAT32


def asked(server, path, question) -> dict:
    """Return the response of one endpoint of the server."""
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        json.dumps(question).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A server of the smallest model with the World vocabulary."""
    config = RWKV7Config(vocab_size=65536, num_layers=1, width=64, head_size=64)
    path = tmp_path_factory.mktemp("world") / "m.gguf"
    save_model(path, random_params(config, scale=0.1), config)
    return serve(path)


def test_llama_cpp_tokenizes_like_our_tokenizer(world):
    texts = [
        "Hello, world! <s> </s>\n\nUser: who?",
        "é e\u0301 \U0001f600\U0001f9d1\u200d\U0001f680 \uac00\ud7a3 中文",
        "\x01\x02\t\r\n'\"\\ \\x41 \\n",
        " " * 300 + "#" * 200,
        "[PAD65530] <|unused|>",
        (ROOT / "docs" / "method.md").read_text(encoding="utf-8"),
    ]
    for text in texts:
        ids = asked(world, "tokenize", {"content": text})["tokens"]
        assert ids == Tokenizer.world().encode(text), text[:40]


def test_llama_cpp_renders_chats_like_our_template(world):
    messages = [
        {"role": "user", "content": " Hi\n\n there \n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    # llama.cpp asks every model that can think to do so.
    question = {"messages": messages, "chat_template_kwargs": {"think": "off"}}
    prompt = asked(world, "apply-template", question)["prompt"]
    known = "User: Hi\n there\n\nAssistant: Hello.\n\n"
    assert prompt.encode() == known.encode() + chat_prompt(b"Who?")
