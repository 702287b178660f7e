import pytest

from rwkv7_jax.data.sources import TaskSource, TextSource, parse_source, parse_sources


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("task:copy", TaskSource("copy")),
        ("a.jsonl", TextSource(("a.jsonl",))),
        ("a.jsonl,stdlib", TextSource(("a.jsonl", "stdlib"))),
        ("", TextSource(())),
    ],
)
def test_a_source_path_round_trips(path, source):
    assert parse_source(path) == source
    assert str(source) == path


def test_a_list_is_split_into_tasks_and_texts():
    tasks, texts = parse_sources("task:copy,a.txt,task:pairs,b.txt")
    assert tasks == [TaskSource("copy"), TaskSource("pairs")]
    assert texts == TextSource(("a.txt", "b.txt"))
    assert parse_sources("") == ([], TextSource(()))
