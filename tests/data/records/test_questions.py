"""Questions and answers under the key names of published data sets."""

import itertools
import json
import re

import pytest
from marked_records import marked

from rwkv7_jax.data.readers import documents
from rwkv7_jax.data.records.questions import ANSWERS, QUESTIONS
from rwkv7_jax.data.records.record import parse_record

CHAT = "[User: a\n\nAssistant:] b"

AS_THEY_STAND = ("answer", "completion", "response", "output")

SPOKEN = (("user", "assistant"), ("human", "assistant"))

PAIRS = (*itertools.product((*QUESTIONS, "input"), ANSWERS), *SPOKEN)


def with_nulls(record):
    """Add every other key with a null value, as tables do."""
    names = (*QUESTIONS, *ANSWERS, *AS_THEY_STAND, "input", "context", "user", "human")
    names += ("assistant", "text", "messages", "conversation", "reasoning", "system")
    return dict.fromkeys(names) | record


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_a_question_and_its_answer_form_a_chat_of_two_messages(question, answer):
    for record in ({question: "a", answer: "b"}, {answer: "b", question: "a", "id": 7}):
        assert marked(record) == marked(with_nulls(record)) == CHAT


@pytest.mark.parametrize("answer", AS_THEY_STAND)
def test_a_prompt_is_kept_verbatim_under_every_answer_name(answer):
    record = {"prompt": "a", answer: "b"}
    assert marked(record) == marked(with_nulls(record)) == "[a]b"
    for other in (*QUESTIONS, "input", "context", "system", "history"):
        assert marked({**record, other: ""}) == "[a]b"
        reason = f'"{other}" next to a "prompt" that is read verbatim'
        with pytest.raises(ValueError, match=reason):
            parse_record({**record, other: "c"})
    for other in AS_THEY_STAND:
        if other != answer:
            with pytest.raises(ValueError, match="in one object"):
                parse_record({**record, other: "c"})


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_two_questions_or_answers_are_rejected(question, answer):
    """Alpaca's two names, and the final answer next to a solution, are exceptions."""
    record = {question: "a", answer: "b"}
    for names in (QUESTIONS, ANSWERS):
        for other in names:
            both = {**record, other: "c"}
            if other in record or {"instruction", "output"} <= set(both):
                continue
            if question == "input" and other in QUESTIONS:
                assert marked(both) == "[User: c\na\n\nAssistant:] b"
            elif question == "problem" and {answer, other} == {"solution", "answer"}:
                assert marked(both).endswith(" " + both["solution"])
            else:
                with pytest.raises(ValueError, match=r'"\w+" and "\w+" in one object'):
                    parse_record(both)


def test_a_user_id_is_not_a_question():
    assert marked({"user": "u7", "question": "a", "answer": "b"}) == CHAT
    with pytest.raises(ValueError, match='"user" and "human" in one object'):
        parse_record({"user": "u7", "human": "a", "assistant": "b"})
    with pytest.raises(ValueError, match='its keys are "user", "text7"'):
        parse_record({"user": "u7", "text7": "b"})


TURNS = (*SPOKEN, ("input", "output"))


@pytest.mark.parametrize("name", ["conversation", "conversations", "messages"])
@pytest.mark.parametrize(("question", "answer"), TURNS)
def test_a_turn_may_hold_a_question_and_its_answer(name, question, answer):
    """The order of the two keys does not matter, because tables sort them."""
    turns = [{question: "a", answer: "b"}, {answer: "d", question: "c", "role": None}]
    assert marked({"conversation_id": 1, name: turns}) == (
        f"{CHAT}[\n\nUser: c\n\nAssistant:] d"
    )
    turns[0] |= {"reasoning": "hm", "system": "Be kind."}
    turns[1]["weight"] = 0
    assert marked({"system": "Be kind.", name: turns}) == (
        "[System: Be kind.\n\nUser: a\n\nAssistant:] <think>\nhm\n</think>\nb"
        "[\n\nUser: c\n\nAssistant:][ d]"
    )


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"Human": "a", "MOSS": "b"}, 'got None, and its keys are "Human", "MOSS"'),
        ({"user": "a"}, "message 1: role must be system, user, assistant, tool; got"),
        ({"instruction": "a", "input": "b", "output": "c"}, '"instruction", "input"'),
        ({"question": "a", "answer": "b"}, 'its keys are "question", "answer"'),
        ({"human": "a", "assistant": 7}, 'turn 1: "assistant" must be a string'),
        (
            {"human": "a", "assistant": "b", "answer": "c"},
            'turn 1: "answer" and "assistant" in one object',
        ),
        ({"human": "a", "assistant": ""}, "message 2: an empty answer"),
    ],
)
def test_a_turn_without_a_role_is_rejected_with_its_keys(turn, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_record({"conversation": [turn]})


def read(path):
    return [document.text().decode() for document in documents(path)]


CHAT_TEXT = "User: a\n\nAssistant: b"


@pytest.mark.parametrize(
    ("question", "answer"), [*SPOKEN, ("input", "output"), ("problem", "solution")]
)
def test_files_of_question_records_are_not_read_as_text(tmp_path, question, answer):
    path = tmp_path / "x.json"
    records = [{question: "a", answer: "b"}] * 3
    columns = {
        name: {str(row): records[row][name] for row in range(3)} for name in records[0]
    }
    for content in (records, {"data": records}, {"train": records}, columns):
        path.write_text(json.dumps(content))
        assert read(path) == [CHAT_TEXT] * 3
    path = tmp_path / "x.txt"
    path.write_text(json.dumps(records[0]))
    with pytest.raises(ValueError, match="holds records as lines of JSON"):
        read(path)


def test_json_with_non_text_inputs_and_outputs_is_read_as_text(tmp_path):
    path = tmp_path / "x.json"
    grids = [{"input": [[0, 1]], "output": [[1, 0]]}] * 2
    content = json.dumps({"train": grids, "test": grids})
    path.write_text(content)
    assert read(path) == [content]
