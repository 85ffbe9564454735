"""The offline suite: length, determinism, answers, and an oracle that knows them all."""

import re

import pytest

from experiments.core.errors import UserError
from experiments.core.tasks import fill_prompt
from experiments.longbench.metrics import score_prediction
from experiments.longbench.offline import OFFLINE_SETS, build_row, build_suite
from experiments.longbench.offline_tasks import LINE_KINDS, line_kind
from experiments.longbench.stdlib_text import code_files, prose_sentences


def count_words(text):
    return len(text.split())


def count_pieces(text):
    return len(re.findall(r"\w{1,4}|\s?[^\w\s]|\n", text))


@pytest.fixture(scope="module")
def suite():
    return build_suite(
        list(OFFLINE_SETS.values()), count_tokens=count_pieces, length=1000, rows=4, seed=0
    )


def rows_of(suite):
    return [(task.spec, row) for task in suite for row in task.rows]


@pytest.mark.parametrize(("count", "length"), [(count_words, 600), (count_pieces, 3000)])
@pytest.mark.parametrize("name", OFFLINE_SETS)
def test_prompts_end_a_few_tokens_below_the_length(name, count, length):
    for i in range(2):
        prompt = fill_prompt(
            OFFLINE_SETS[name].prompt, build_row(OFFLINE_SETS[name], count, length, f"{name}-{i}")
        )
        assert length - 4 <= count(prompt) <= length


def test_the_same_seed_makes_the_same_rows_and_another_makes_others(suite):
    specs = list(OFFLINE_SETS.values())
    options = {"count_tokens": count_pieces, "length": 1000, "rows": 2}
    again = build_suite(specs, seed=0, **options)
    assert [t.rows for t in again] == [t.rows[:2] for t in suite]
    other = build_suite(specs, seed=1, **options)
    for mine, theirs in zip(suite, other, strict=True):
        assert mine.checksum != theirs.checksum
        assert not {row.context for row in mine.rows} & {row.context for row in theirs.rows}


def test_rows_of_a_set_differ(suite):
    for task in suite:
        assert len({(row.context, row.input) for row in task.rows}) == len(task.rows)


def test_answers_are_longer_than_a_token_and_stand_in_the_context(suite):
    for spec, row in rows_of(suite):
        (answer,) = row.answers
        assert count_words(answer) >= 2, spec.name
        if spec.name != "code_line":
            assert answer in row.context, spec.name
        prompt = fill_prompt(spec.prompt, row)
        assert not prompt.endswith(answer)


def oracle(spec, row):
    if spec.name == "kv_needle":
        return re.search(rf"secret code of {row.input} is ([^.]*)\.", row.context).group(1)
    if spec.name == "passage_retrieval":
        return re.search(f"Title: {row.input}\n(.*)", row.context).group(1)
    if spec.name == "quote_recall":
        assert row.context.count(row.input) == 1
        return row.context.split(row.input)[1]
    if spec.name == "few_shot":
        return line_kind(row.input.removeprefix("Line: ").removesuffix("\nKind:"))
    before = "\n".join(row.context.split("\n")[-10:]) + "\n"
    for lines in code_files().values():
        parts = "\n".join(lines).split(before)
        if len(parts) == 2:
            return parts[1].split("\n")[0]
    raise AssertionError("the context is no code of the standard library")


def test_an_oracle_scores_100(suite):
    for spec, row in rows_of(suite):
        score = score_prediction(spec, oracle(spec, row), row.answers, row.all_classes)
        assert score == pytest.approx(100), (spec.name, row.input)


def test_another_rows_answer_does_not_score_100(suite):
    for task in suite:
        row, other = task.rows[:2]
        if row.answers != other.answers:
            score = score_prediction(task.spec, other.answers[0], row.answers, row.all_classes)
            assert score < 60, task.spec.name


def test_labels_of_few_shot_are_not_parts_of_each_other():
    for a in LINE_KINDS:
        assert [b for b in LINE_KINDS if a in b] == [a]


def test_every_label_has_an_example(suite):
    for task in suite:
        if task.spec.name == "few_shot":
            for row in task.rows:
                assert row.all_classes == tuple(LINE_KINDS)
                assert all(row.context.count(f"Kind: {kind}") >= 2 for kind in LINE_KINDS)
                assert row.input not in row.context


def test_no_offline_set_has_a_chat_template_or_a_longbench_name():
    from experiments.longbench.sets import LONGBENCH_SETS

    assert not OFFLINE_SETS.keys() & LONGBENCH_SETS.keys()
    assert not any(spec.chat for spec in OFFLINE_SETS.values())


@pytest.mark.parametrize("name", OFFLINE_SETS)
def test_too_short_a_length_names_the_set(name):
    with pytest.raises(UserError, match=f"set {name}: .*too few"):
        build_row(OFFLINE_SETS[name], count_pieces, 40, "x")


def test_longer_than_the_texts():
    # What is asked must be unique, so a text that repeats itself is refused for these.
    for name in ("passage_retrieval", "quote_recall"):
        with pytest.raises(UserError, match="ends at"):
            build_row(OFFLINE_SETS[name], count_words, 1_000_000, "x")


def test_texts_are_plentiful():
    assert len(prose_sentences()) > 500
    assert len(set(prose_sentences())) == len(prose_sentences())
    assert sum(map(len, code_files().values())) > 20_000
