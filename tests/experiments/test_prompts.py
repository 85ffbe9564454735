"""What a model is asked: templates of both protocols, cuts, and questions that are set apart."""

import dataclasses

import pytest

from experiments.core.errors import UserError
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import Row, SetSpec
from tests.experiments.fakes import BOS, CHAT, EOS, OFFICIAL, PLAIN, TURN_END, CharTokenizer, row

RELEASED = Prompting(
    protocol="released", max_length=100, eos_ids=(EOS,), turn_end_ids=(TURN_END,), inst_style=True
)


def shown(ids):
    return "".join({0: "<s>", 1: "</s>", 2: "<t>"}.get(i) or chr(i - 3) for i in ids)


@pytest.mark.parametrize(
    ("spec", "prompting", "chat", "expected", "stop", "least"),
    [
        (CHAT, OFFICIAL, True, "<s>user: Q: text 0 in 0<t>bot: ", (EOS, TURN_END), 0),
        (CHAT, OFFICIAL, False, "<s>Q: text 0 in 0", (EOS, TURN_END), 0),
        (PLAIN, OFFICIAL, True, "<s>text 0", (EOS, TURN_END, ord("\n") + 3), 1),
        (CHAT, RELEASED, True, "<s>[INST] Q: text 0 in 0 [/INST]", (EOS,), 1),
        (PLAIN, RELEASED, True, "<s>[INST] text 0 [/INST]", (EOS,), 1),
    ],
)
def test_build_prompt(spec, prompting, chat, expected, stop, least):
    prompt = build_prompt(row(), spec, CharTokenizer(chat=chat), prompting)
    assert shown(prompt.ids) == expected
    assert prompt.stop_ids == stop
    assert prompt.min_new_tokens == least


def test_truncation_comes_before_the_template_and_after_inst():
    tokenizer = CharTokenizer()
    long = Row(input="END", context="START " + "x" * 500, answers=("a",), length=1)
    official = build_prompt(long, CHAT, tokenizer, OFFICIAL)
    text = shown(official.ids)
    assert text.startswith("<s>user: Q: START x")
    assert text.endswith("x END<t>bot: ")
    # The beginning-of-sequence token counted in the first half.
    assert len(official.ids) == 99 + len("_user: _bot: ")
    released = build_prompt(long, CHAT, tokenizer, RELEASED)
    assert shown(released.ids).startswith("<s>[INST] Q: START x")
    assert shown(released.ids).endswith("x END [/INST]")
    assert len(released.ids) == 100


def test_a_model_without_bos_gets_none():
    prompt = build_prompt(row(), PLAIN, CharTokenizer(bos=False), OFFICIAL)
    assert BOS not in prompt.ids


def test_the_answer_prefix_begins_the_models_turn():
    began = dataclasses.replace(row(), answer_prefix="It is")
    tokenizer = CharTokenizer()
    chat = build_prompt(began, CHAT, tokenizer, OFFICIAL)
    assert shown(chat.ids) == "<s>user: Q: text 0 in 0<t>bot: It is"
    plain = build_prompt(began, PLAIN, tokenizer, OFFICIAL)
    assert shown(plain.ids) == "<s>text 0\nIt is"


def test_prompts_made_to_measure_are_not_cut():
    long = Row(input="", context="x" * 500, answers=("a",), length=1)
    prompting = dataclasses.replace(OFFICIAL, max_length=None)
    assert len(build_prompt(long, PLAIN, CharTokenizer(), prompting).ids) == 501


AGNOSTIC = dataclasses.replace(OFFICIAL, query_agnostic=True)


@pytest.mark.parametrize(
    ("spec", "prompting", "chat", "context", "question"),
    [
        (CHAT, AGNOSTIC, True, "<s>user: Q: text 0", " in 0<t>bot: It is"),
        (CHAT, AGNOSTIC, False, "<s>Q: text 0", " in 0\nIt is"),
        # Nothing of the prompt follows the context.
        (PLAIN, AGNOSTIC, True, "<s>text 0", "\nIt is"),
        (
            CHAT,
            dataclasses.replace(RELEASED, query_agnostic=True),
            True,
            "<s>[INST] Q: text 0",
            " in 0 [/INST]\nIt is",
        ),
    ],
)
def test_questions_are_set_apart_and_the_prompt_stays(spec, prompting, chat, context, question):
    began, tokenizer = dataclasses.replace(row(), answer_prefix="It is"), CharTokenizer(chat=chat)
    prompt = build_prompt(began, spec, tokenizer, prompting)
    assert shown(prompt.ids[: prompt.context_tokens]) == context
    assert shown(prompt.ids[prompt.context_tokens :]) == question
    whole = dataclasses.replace(prompting, query_agnostic=False)
    assert build_prompt(began, spec, tokenizer, whole).ids == prompt.ids
    assert build_prompt(began, spec, tokenizer, whole).context_tokens is None


def test_the_context_is_the_same_whatever_is_asked():
    prompts = [
        build_prompt(dataclasses.replace(row(), input=question), CHAT, CharTokenizer(), AGNOSTIC)
        for question in ("Who?", "When was that?", "text 0")
    ]
    assert len({tuple(prompt.ids[: prompt.context_tokens]) for prompt in prompts}) == 1


def test_tokens_across_the_border_belong_to_the_question():
    class Pairs(CharTokenizer):
        """Joins two letters to a token, from the start of the text."""

        def encode(self, text, *, add_bos=None, parse_special=True):
            return [
                1000 * ord(text[i]) + ord(text[i + 1 : i + 2] or "_")
                for i in range(0, len(text), 2)
            ]

    spec = dataclasses.replace(CHAT, prompt="{context}{input}", chat=False)
    ask = dataclasses.replace(row(), context="abc", input="xyz")
    prompt = build_prompt(ask, spec, Pairs(), AGNOSTIC)
    assert prompt.context_tokens == 1
    with pytest.raises(UserError, match=r"set chat: .* share their tokens"):
        build_prompt(dataclasses.replace(ask, context="a"), spec, Pairs(), AGNOSTIC)


def test_truncation_keeps_questions_apart_or_refuses():
    long = Row(input="END", context="START " + "x" * 500, answers=("a",), length=1)
    prompt = build_prompt(long, CHAT, CharTokenizer(), AGNOSTIC)
    assert shown(prompt.ids[: prompt.context_tokens]).startswith("<s>user: Q: START xx")
    assert shown(prompt.ids[prompt.context_tokens :]) == " END<t>bot: "
    asks_much = dataclasses.replace(long, input="y" * 60)
    with pytest.raises(UserError, match="set chat: truncation cuts a question"):
        build_prompt(asks_much, CHAT, CharTokenizer(), AGNOSTIC)


def test_an_empty_prompt_is_refused():
    empty = SetSpec(name="e", prompt="{context}", max_new_tokens=1, metric="qa_f1", chat=False)
    nothing = Row(input="", context="", answers=("a",), length=0)
    with pytest.raises(UserError, match="set e: a row makes an empty prompt"):
        build_prompt(nothing, empty, CharTokenizer(bos=False), OFFICIAL)
