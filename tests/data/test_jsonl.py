"""Lines as documents: World's template, and what of it is learnt."""

import pytest

from rwkv7_jax.data.jsonl import parse_record
from rwkv7_jax.text.tokenizer import Tokenizer


def marked(record):
    """The document's text, what is only read in square brackets."""
    pieces = parse_record(record).segments
    return "".join(p.text.decode() if p.in_loss else f"[{p.text.decode()}]" for p in pieces)


def say(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_of_a_text_all_is_learnt_and_of_a_question_the_answer():
    assert marked({"text": "a b", "source": 7}) == "a b"
    assert marked({"prompt": "2+2=", "answer": "4"}) == "[2+2=]4"
    assert marked({"prompt": "", "answer": "4"}) == "[]4"


def test_a_conversation_is_in_the_template_and_the_assistants_words_are_learnt():
    record = say(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))
    record["messages"] += say(("user", "Bye"), ("assistant", "Bye!"))["messages"]
    assert marked(record) == (
        "[System: Be brief.\n\nUser: Hi\n\nAssistant:] Hello.[\n\nUser: Bye\n\nAssistant:] Bye!"
    )


@pytest.mark.parametrize("blank", ["\n\n", "\r\n\r\n", "\n \n", "\n\n\t\n", "  \n\n"])
def test_blank_lines_inside_a_turn_go_since_one_ends_it(blank):
    record = say(("user", f"\n a{blank}b\n"), ("assistant", f"c{blank}  d{blank}"))
    assert marked(record) == "[User: a\nb\n\nAssistant:] c\n  d"


@pytest.mark.parametrize("tokenizer", [Tokenizer.bytes(), Tokenizer.world()], ids=lambda t: t.name)
def test_a_prompt_has_the_ids_that_it_has_without_its_answer(tokenizer):
    prompt = "User: Hi\n\nAssistant:"
    for record in (say(("user", "Hi"), ("assistant", "Ho")), {"prompt": prompt, "answer": " Ho"}):
        found = [(ids.tolist(), learnt) for ids, learnt in parse_record(record).ids(tokenizer)]
        answer = tokenizer.encode(" Ho")
        assert found == [(tokenizer.encode(prompt), False), (answer, True), ([0], True)]
