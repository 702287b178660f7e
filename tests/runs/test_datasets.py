"""A run's data from its settings: the same batches from a source, its cache and several hosts."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from rwkv7_jax.data.loading import data_hash, host_rows
from rwkv7_jax.data.token_cache import write_cache
from rwkv7_jax.data.token_streams import as_stream
from rwkv7_jax.runs import waiting
from rwkv7_jax.runs.datasets import TrainingData, digest_of, held_out
from rwkv7_jax.runs.settings import read_settings
from rwkv7_jax.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Answered questions, and their cache."""
    folder = tmp_path_factory.mktemp("data")
    lines = [
        json.dumps({"prompt": f"{i} + {i} =", "answer": f" {2 * i}"})
        for i in range(200)
    ]
    (folder / "x.jsonl").write_text("\n".join(lines))
    write_cache([folder / "x.jsonl"], folder / "x.bin", BYTES)
    return str(folder / "x.jsonl"), str(folder / "x.bin")


def settings_of(path, mode="state", **changes):
    data = {"path": path, "batch_size": 6, "length": 20, "held_out": 0.2}
    groups = ("tuning", "upscaling", "model")
    others = {name: changes.pop(name) for name in groups if name in changes}
    measure = {"windows": 5, "length": 20}
    return read_settings(
        {
            **others,
            "mode": mode,
            "data": data | changes,
            "evaluation": measure,
        }
    )


def data_of(settings):
    return TrainingData(settings, BYTES)


def batches(settings, count=4, **choices):
    found = data_of(settings).batches(**choices)
    return [next(found) for _ in range(count)]


def held_out_rows(settings):
    return held_out(settings, BYTES)


def assert_equal(one, two):
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


CHOICES = ({}, {"packing": "stream"}, {"order": "cubic"}, {"packing": "documents"})


@pytest.mark.parametrize(
    "choices", CHOICES, ids=["auto", "stream", "cubic", "documents"]
)
def test_a_token_cache_gives_the_batches_of_its_source(paths, choices):
    one, two = (settings_of(path, **choices) for path in paths)
    hashes = [data_hash(data_of(settings).stream) for settings in (one, two)]
    assert hashes[0] == hashes[1]
    for pair in zip(batches(one), batches(two), strict=True):
        assert_equal(*pair)
        assert 0 < pair[0]["mask"].mean() < 1
    assert_equal(held_out_rows(one), held_out_rows(two))


@pytest.mark.parametrize(
    ("changes", "packing"),
    [
        ({}, "packed"),
        ({"mode": "upscaled_state"}, "packed"),
        ({"mode": "upscaled_state", "upscaling": {"dynamics": "delta"}}, "documents"),
        ({"model": {"implementation": "triton"}}, "documents"),
        ({"order": "cubic"}, "stream"),
        ({"packing": "stream"}, "stream"),
        ({"mode": "pretrain"}, "stream"),
        ({"mode": "observer"}, "stream"),
    ],
)
def test_state_tuning_reads_questions_from_their_beginning(
    paths, tmp_path, changes, packing
):
    settings = settings_of(paths[0], **changes)
    data = data_of(settings)
    assert data.packing == packing
    assert ("packing" in data.describe()) == (packing in ("packed", "documents"))
    (batch,) = batches(settings, count=1)
    same = settings_of(paths[0], **(changes | {"packing": packing}))
    assert_equal(batch, batches(same, count=1)[0])
    assert_equal(held_out_rows(settings), held_out_rows(same))
    # Text is one stream for all of them.
    text = tmp_path / "text.txt"
    text.write_text("one and two " * 40)
    assert data_of(settings_of(str(text), **changes)).packing == "stream"


@pytest.mark.parametrize("packing", ["auto", "documents", "packed"])
def test_held_out_rows_hold_single_documents(paths, packing):
    held = held_out_rows(settings_of(paths[0], packing=packing))
    assert held["tokens"].shape == (5, 21)
    for tokens, mask in zip(held["tokens"], held["mask"], strict=True):
        text = BYTES.decode(tokens.tolist())
        number = int(text.split(" ")[0])
        assert text == f"{number} + {number} = {2 * number}"
        assert BYTES.decode((tokens[1:] * (mask > 0)).tolist()) == f" {2 * number}"


@pytest.mark.parametrize("read", [data_of, held_out_rows])
def test_a_text_that_takes_long_to_read_is_named_in_the_meantime(
    read, paths, monkeypatch, capsys
):
    encode = Tokenizer.encode_chunks

    def slowly(*words):
        time.sleep(0.005)
        return encode(*words)

    monkeypatch.setattr(Tokenizer, "encode_chunks", slowly)
    monkeypatch.setattr(waiting, "SECONDS", 0.05)
    read(settings_of(paths[0]))
    assert "waiting for the text of `config.data.path` (" in capsys.readouterr().err
    # Ids need no reading.
    read(settings_of(paths[1]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [
        *CHOICES,
        {"path": "task:copy"},
        {"tuning": {"anchor": 1.0, "anchor_path": "task:copy"}},
    ],
    ids=["auto", "stream", "cubic", "documents", "task", "anchor"],
)
def test_hosts_together_make_the_global_batch_from_any_step_on(paths, changes):
    settings = settings_of(**{"path": paths[1], **changes, "length": 48})
    whole = batches(settings, count=6)
    for start, hosts in itertools.product((0, 4), (2, 3)):
        parts = [
            batches(settings, count=2, start_step=start, rows=host_rows(6, host, hosts))
            for host in range(hosts)
        ]
        for step in range(2):
            joined = {
                name: np.concatenate([part[step][name] for part in parts])
                for name in whole[0]
            }
            assert_equal(joined, whole[start + step])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "packing",
            "`config.data.packing` must be auto, stream, documents or packed; got 'x'",
        ),
        ("order", "`config.data.order` must be shuffled or cubic; got 'x'"),
        ("on_bad", "`config.data.on_bad` must be error or skip; got 'x'"),
    ],
)
def test_unknown_choices_are_rejected_in_one_sentence(name, reason):
    with pytest.raises(ValueError, match=reason):
        read_settings({"data": {name: "x"}})


def test_the_cubic_order_is_rejected_for_rows_of_documents():
    with pytest.raises(
        ValueError, match=r'`config\.data\.order` must be "shuffled" if'
    ):
        settings_of("x", order="cubic", packing="documents")


def test_the_digests_of_texts_depend_on_their_ids(tmp_path):
    general = tmp_path / "general.txt"
    read = []
    for text in ("calm and collected " * 40, "calm and colourful " * 40):
        general.write_text(text)
        settings = read_settings(
            {
                "mode": "state",
                "data": {"path": "task:mapping", "length": 8, "held_out": 0.0},
                "tuning": {"anchor": 1.0, "anchor_path": str(general)},
            }
        )
        read.append(data_of(settings).digests())
    one, two = read
    assert one["data"] == two["data"] and one["anchor"] != two["anchor"]


def test_the_data_digest_depends_on_each_id_or_the_bytes_of_the_file(tmp_path):
    ids = np.arange(5000, dtype=np.uint16)
    other = ids.copy()
    other[4321] += 1
    one = as_stream(ids)
    two = as_stream(other)
    assert data_hash(one) != data_hash(two)
    digests = []
    for text in ("one", "two"):
        (tmp_path / "q.jsonl").write_text(text)
        digests.append(digest_of(str(tmp_path / "q.jsonl")))
    assert digests[0] != digests[1]


@pytest.fixture
def long_prompts(tmp_path):
    """Questions of 100 bytes with short answers; with `short` every second one is shorter."""

    def write(*, short=0):
        lines = []
        for number in range(40):
            size = 5 if number < short else 100
            lines.append(
                json.dumps({"prompt": f"{number:02}" + "?" * size, "answer": "!"})
            )
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        return str(tmp_path / "x.jsonl")

    return write


def test_prompts_longer_than_every_row_are_rejected_with_a_useful_length(
    long_prompts,
):
    settings = settings_of(long_prompts(), packing="documents")
    with pytest.raises(
        ValueError, match=r"`config.data.length` must be .* useful length is 102;"
    ):
        data_of(settings)
    with pytest.raises(
        ValueError, match=r"`config.evaluation.length` must be large enough"
    ):
        held_out_rows(settings)
    # Rows of a stream begin inside of questions too.
    stream = settings_of(long_prompts(), packing="stream")
    assert "2.9% of targets" not in data_of(stream).describe()


def test_rows_without_a_target_are_counted_and_the_share_is_described(long_prompts):
    with pytest.warns(
        UserWarning, match=r"of 3\d documents have no target that counts within"
    ):
        data = data_of(settings_of(long_prompts(short=20), packing="documents"))
    share = data.targets.in_loss / data.targets.targets
    assert 0 < share < 0.2
    assert data.describe().endswith(f"tokens, {share:.1%} of targets count")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"length": 5000, "packing": "stream"},
            "`config.data.length` must be at most half of the .*; got 5000",
        ),
        ({"path": ""}, "`config.data.path` must name what to read"),
        (
            {"path": "{path},"},
            "`config.data.path` must have a name between commas; entry 2",
        ),
        (
            {"path": ",{path}"},
            "`config.data.path` must have a name between commas; entry 1",
        ),
        ({"path": "{path},,{path}"}, "`config.data.path` must have a name .*; entry 2"),
        ({"path": "{path}, "}, "`config.data.path` must have a name .*; entry 2"),
        ({"path": ","}, "`config.data.path` must have a name between commas"),
        (
            {"evaluation": "{path},"},
            "`config.data.evaluation` must have a name between commas",
        ),
        ({"encoding": "klingon"}, "`encoding` must be a text encoding"),
        (
            {"tuning": {"anchor": 1.0, "anchor_path": "{path},"}},
            "`config.tuning.anchor_path` must",
        ),
    ],
)
def test_settings_that_give_no_rows_are_rejected_by_name(paths, changes, sentence):
    changes = dict(changes)
    path = changes.pop("path", "{path}").format(path=paths[0])
    if "evaluation" in changes:
        changes["evaluation"] = changes["evaluation"].format(path=paths[0])
    if "tuning" in changes:
        anchor_path = changes["tuning"]["anchor_path"].format(path=paths[0])
        changes["tuning"] = changes["tuning"] | {"anchor_path": anchor_path}
    with pytest.raises(ValueError, match=sentence):
        batches(settings_of(path, **changes))


@pytest.mark.parametrize(
    "lists", [{"state": "a.pth,"}, {"evaluation": {"retention": "a,,b"}}]
)
def test_lists_of_names_have_no_empty_entries(lists):
    with pytest.raises(ValueError, match="must have a name between commas; entry 2"):
        read_settings(lists)


def test_held_out_text_that_is_too_short_names_the_setting(paths):
    settings = settings_of(paths[0], packing="stream")
    evaluation = dataclasses.replace(settings.evaluation, length=9000)
    long = dataclasses.replace(settings, evaluation=evaluation)
    with pytest.raises(
        ValueError, match=r"`config.evaluation.length` must be .*held_out` is"
    ):
        held_out(long, BYTES)
