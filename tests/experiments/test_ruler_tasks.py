"""RULER's generators: length, needles, depth, determinism, and an oracle that reads the prompt."""

import dataclasses
import random
import re
from collections import Counter

import pytest

from experiments.core.errors import UserError
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import Measure
from experiments.ruler.draws import depths_of, join_names, spread
from experiments.ruler.scoring import score_prediction
from experiments.ruler.sources import Sources
from experiments.ruler.tasks import TASKS, averages_of, build_sets, make_rows, make_spec
from tests.experiments.fakes import CharTokenizer
from tests.experiments.ruler_data import count_pieces, count_words, solve, whole, write_folder

# A prompt is never longer than asked, and shorter by less than this many tokens; by twice as many
# where a passage's heading must fit as well.
SLACK = 8
SYNTHETIC = [name for name in TASKS if not name.startswith("qa")]
NIAH = [name for name in TASKS if name.startswith("niah")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(str(write_folder(tmp_path_factory.mktemp("ruler"))))


def rows_of(sources, name, length, rows=2, seed=0, count=count_pieces):
    measure = Measure(lengths=(length,), rows=rows, seed=seed, chat=False, count=count)
    (task,), _ = build_sets([name], sources, measure, explicit=True)
    return task


def test_the_tasks_are_the_official_ones():
    lengths = {name: task.max_new_tokens for name, task in TASKS.items()}
    assert list(lengths) == [
        *("niah_single_1", "niah_single_2", "niah_single_3"),
        *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    ]
    assert [*lengths.values()] == [128] * 8 + [30, 120, 50, 32, 32]
    assert [name for name, task in TASKS.items() if task.metric == "string_match_part"] == [
        "qa_1",
        "qa_2",
    ]


@pytest.mark.parametrize(
    ("count", "length"),
    [(count_pieces, 512), (count_pieces, 1024), (count_pieces, 4096), (count_words, 700)],
)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_as_long_as_asked_and_an_oracle_scores_100(sources, name, count, length):
    task = rows_of(sources, name, length, count=count)
    for row in task.rows:
        tokens = count(task.spec, row) + TASKS[name].max_new_tokens
        assert length - (2 * SLACK if "qa" in name else SLACK) < tokens <= length
        assert row.length == tokens
        prompt = whole(task.spec, row)
        assert score_prediction(task.spec, solve(name, prompt), row.answers, None) == 100


@pytest.mark.parametrize("name", ["niah_multikey_2", "vt", "cwe", "fwe"])
def test_the_longest_prompts(sources, name):
    task = rows_of(sources, name, 131_072, rows=1)
    assert 131_072 - SLACK < task.rows[0].length <= 131_072
    solved = solve(name, whole(task.spec, task.rows[0]))
    assert score_prediction(task.spec, solved, task.rows[0].answers, None) == 100


@pytest.mark.parametrize("chat", [True, False])
def test_lengths_count_the_chat_template_and_the_answers_beginning(sources, chat):
    tokenizer = CharTokenizer()
    prompting = Prompting(protocol="official", max_length=None, eos_ids=(1,))

    def count(spec, row):
        return len(build_prompt(row, spec, tokenizer, prompting).ids)

    spec = make_spec("niah_single_1", 1200, chat=chat)
    row = next(make_rows("niah_single_1", spec, 1200, sources, seed=0, count=count))
    text = "".join(chr(i - 3) for i in build_prompt(row, spec, tokenizer, prompting).ids if i > 2)
    assert len(build_prompt(row, spec, tokenizer, prompting).ids) == 1200 - 128
    assert text.endswith(("bot: " if chat else "\n") + row.answer_prefix)


@pytest.mark.parametrize("name", TASKS)
def test_rows_depend_on_their_number_seed_and_length_alone(sources, name):
    task = rows_of(sources, name, 700, rows=3, count=count_words)
    random.seed(7)
    again = rows_of(sources, name, 700, rows=3, count=count_words)
    assert again == task
    assert rows_of(sources, name, 700, rows=1, count=count_words).rows == task.rows[:1]
    texts = {(row.context, row.input) for row in task.rows}
    other = rows_of(sources, name, 700, rows=3, seed=1, count=count_words)
    assert len(texts | {(row.context, row.input) for row in other.rows}) == 6
    assert [row.others["seed"] for row in other.rows] == [1, 1, 1]


@pytest.mark.parametrize("name", TASKS)
def test_rows_know_what_they_are(sources, name):
    task = rows_of(sources, name, 600, count=count_words)
    assert task.spec.name == f"600/{name}"
    for index, row in enumerate(task.rows):
        assert row.row_id == f"{name}-600-0-{index}"
        assert {"task": name, "length": 600, "seed": 0}.items() <= row.others.items()
        # The question is no part of the context, which may be compressed without it.
        assert row.input not in row.context
        assert any(answer in row.context for answer in row.answers)


@pytest.mark.parametrize(
    ("name", "needles", "asked"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_of_haystacks_of_text(sources, name, needles, asked):
    for row in rows_of(sources, name, 1500, rows=6).rows:
        found = re.findall(r"A secret (\w+) kept by ([\w-]+) is ([\w-]+)\.", row.context)
        assert len(found) == needles
        assert len(row.answers) == asked
        assert {value for _, _, value in found} >= set(row.answers)
        assert len({key for _, key, _ in found}) == (1 if name == "niah_multivalue" else needles)
        kind = "uuid" if name == "niah_single_3" else "number"
        form = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if kind == "uuid" else r"[1-9]\d{6}"
        assert all(k == kind and re.fullmatch(form, value) for k, _, value in found)
        assert row.answer_prefix.endswith(" is" if asked == 1 else " are")


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_needles_of_haystacks_of_needles(sources, name):
    for row in rows_of(sources, name, 3000).rows:
        lines = row.context.split("\n")
        found = [re.fullmatch(r"A secret \w+ kept by (\S+) is (\S+)\.", line) for line in lines]
        # The first line may be the end of one.
        assert all(found[1:])
        assert len(found) > 20
        keys = [match[1] for match in found if match]
        assert len(set(keys)) == len(keys)
        assert sum(key in row.input for key in keys) == 1
        assert row.context.count(row.answers[0]) == 1


@pytest.mark.parametrize("name", NIAH)
def test_depths_are_where_the_needles_stand_and_spread_over_the_context(sources, name):
    task = rows_of(sources, name, 1500, rows=12)
    depths = []
    for row in task.rows:
        for answer, depth in zip(row.answers, row.others["depths"], strict=True):
            # Of the needle's characters some stand before the value and some after.
            at = row.context.index(f"is {answer}.")
            needle = row.context.rfind("A secret", 0, at)
            length = at + len(f"is {answer}.") - needle
            assert depth == pytest.approx(100 * needle / (len(row.context) - length), abs=0.051)
            depths.append(depth)
    assert min(depths) < 25
    assert max(depths) > 75
    assert len(set(depths)) > 6


def test_needles_stand_between_sentences(sources):
    for row in rows_of(sources, "niah_single_2", 1500, rows=4).rows:
        before, after = re.split(r"A secret number kept by \S+ is \d+\.", row.context)
        assert not before or before.endswith(". ")
        assert not after or re.match(" [A-Z]", after)


def test_spread_and_depths():
    units = ["a", "b", "c", "d"]
    assert spread(units, ["X", "Y"], [0.0, 1.0]) == ["X", *units, "Y"]
    assert spread(units, ["X", "Y"], [0.5, 0.5]) == ["a", "b", "X", "Y", "c", "d"]
    assert depths_of("XX........", ["XX"]) == [0.0]
    assert depths_of("........XX", ["XX"]) == [100.0]
    assert depths_of("...XX.", ["XX"]) == [75.0]
    assert depths_of("XX", ["XX"]) == [0.0]
    assert join_names(["a"]) == "a"
    assert join_names(["a", "b", "c"]) == "a, b and c"


def test_variable_tracking_has_one_chain_of_four_hops_after_an_example(sources):
    for row in rows_of(sources, "vt", 2048, rows=4).rows:
        example, text = row.context.split("Remember which value each one gets.")[1:]
        assignments = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
        assert [name for name, _ in assignments] == list(row.answers)
        assert [source for _, source in assignments][1:] == list(row.answers[:-1])
        assert assignments[0][1] in row.input
        assert assignments[0][1] in row.answer_prefix
        assert all(re.fullmatch("[A-Z]{5}", name) for name in row.answers)
        assert row.others["depths"] == sorted(row.others["depths"])
        answer = example.split("Name all of them.\n")[1].split("\n")[0]
        solved = answer.split(":")[1].split()
        assert solved == re.findall(r"VAR ([A-Z]{3}) =", example)
        assert len(solved) == 5


@pytest.mark.parametrize(
    ("length", "common", "others", "example"),
    [(600, 4, 1, []), (2048, 6, 1, [3] * 10 + [1] * 10), (8192, 30, 3, [10] * 10 + [3] * 30)],
)
def test_common_words_come_as_often_as_they_should(sources, length, common, others, example):
    for row in rows_of(sources, "cwe", length).rows:
        parts = [part for part in row.context.split("\n\n") if re.match(r"1\. ", part)]
        counts = Counter(re.findall(r"\d+\. (\S+)", parts[-1]))
        assert {word for word, n in counts.items() if n == common} == set(row.answers)
        rest = [n for word, n in counts.items() if word not in row.answers]
        assert len(rest) >= 5
        # All but the last ones, which fill the length.
        assert sum(n != others for n in rest) <= 5
        assert max(rest) == others
        numbers = [int(n) for n in re.findall(r"(\d+)\. ", parts[-1])]
        assert numbers == [*range(1, len(numbers) + 1)]
        shown = [sorted(Counter(re.findall(r"\. (\S+)", part)).values()) for part in parts[:-1]]
        assert shown == ([sorted(example)] if example else [])


def test_words_beyond_the_lists_come_from_the_longer_list(sources, tmp_path):
    row = rows_of(sources, "cwe", 60_000, rows=1).rows[0]
    used = set(re.findall(r"\d+\. (\S+)", row.context))
    assert used & set(sources.spare_words)
    assert not set(row.answers) & set(sources.spare_words)
    folder = write_folder(tmp_path)
    (folder / "words_alpha.txt").unlink()
    with pytest.raises(UserError, match=r"60000/cwe: .* words_alpha\.txt"):
        rows_of(Sources(str(folder)), "cwe", 60_000)


def test_frequent_words_follow_the_zeta_distribution(sources):
    for row in rows_of(sources, "fwe", 16_384).rows:
        counts = Counter(row.context.split())
        noise = counts.pop("...")
        ranked = [n for _, n in counts.most_common()]
        total = noise + sum(ranked)
        # Shares 6 / pi^2 / rank^2, each count rounded down; dots fill the length.
        for rank, n in enumerate([noise, *ranked[:8]], start=1):
            assert n / total == pytest.approx(0.6079 / rank**2, rel=0.06)
        assert {word for word, _ in counts.most_common(3)} == set(row.answers)


def test_frequent_words_can_be_told_apart_at_any_length(sources):
    for length in range(256, 1500, 31):
        row = rows_of(sources, "fwe", length, rows=1, count=count_words).rows[0]
        counts = [n for _, n in Counter(re.findall("[a-z]{6}", row.context)).most_common()]
        assert counts[2] > counts[3]
        assert length - SLACK < row.length <= length


@pytest.mark.parametrize(("name", "own"), [("qa_1", 1), ("qa_2", 2)])
def test_questions_stand_among_numbered_passages(sources, name, own):
    task = rows_of(sources, name, 1500, rows=12)
    places = set()
    for row in task.rows:
        numbers = [int(n) for n in re.findall(r"^Passage (\d+):$", row.context, re.MULTILINE)]
        assert numbers == [*range(1, len(numbers) + 1)]
        assert len(numbers) > 10
        passages = re.split(r"^Passage \d+:\n", row.context, flags=re.MULTILINE)[1:]
        depths = row.others["depths"]
        assert len(depths) == own
        places |= set(depths)
        # Each passage once; the last of them may be cut.
        assert len({passage.strip() for passage in passages}) == len(passages)
    assert max(places) - min(places) > 40


def test_distractors_of_one_article_come_first(sources):
    # 20 % of the passages of SQuAD are of the question's own article: seven others.
    row = rows_of(sources, "qa_1", 420, rows=1).rows[0]
    passages = [p.strip() for p in re.split(r"Passage \d+:\n", row.context)[1:]]
    data = sources.questions("squad")
    (question,) = [q for q in data.questions if row.input.endswith(q.text)]
    near = [data.passages[i] for i in question.near]
    assert len(near) == 7
    assert 3 <= len(passages) <= 8
    for passage in passages:
        if passage != data.passages[question.own[0]]:
            assert any(text.startswith(passage) for text in near)


def test_passages_start_over_where_the_data_end(sources):
    row = rows_of(sources, "qa_1", 8000, rows=1).rows[0]
    own = row.answers[0]
    assert row.context.count("Passage ") > 100
    assert row.context.count(f" is {own}.") == 1


def test_questions_that_do_not_fit_are_passed_over(sources, tmp_path):
    folder = write_folder(tmp_path)
    path = folder / "squad_made_up.jsonl"
    long = path.read_text().replace("Some say", "word " * 400, 15)
    path.write_text(long)
    task = rows_of(Sources(str(folder)), "qa_1", 500, rows=40)
    assert len(task.rows) == 25
    with pytest.raises(UserError, match="qa_1: no question fits into 80 tokens"):
        rows_of(sources, "qa_1", 80)


def test_lengths_have_their_questions_in_common(sources):
    short, long = (rows_of(sources, "qa_2", n, rows=4).rows for n in (600, 1200))
    assert [row.input for row in short] == [row.input for row in long]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_too_short_a_length_names_the_set(sources, name):
    length = TASKS[name].max_new_tokens + 20
    with pytest.raises(UserError, match=f"set {length}/{name}: 20 tokens are too few"):
        rows_of(sources, name, length)


def test_sets_of_several_lengths_and_their_averages(sources):
    measure = Measure(lengths=(500, 700), rows=1, seed=0, chat=False, count=count_words)
    sets, notes = build_sets(list(TASKS), sources, measure, explicit=False)
    assert notes == []
    assert [task.spec.name for task in sets[::13]] == ["500/niah_single_1", "700/niah_single_1"]
    averages = {average.name: average.sets for average in averages_of(sets)}
    assert list(averages) == [
        "500: average of all 13 tasks",
        "500: average of the 11 tasks without QA",
        "700: average of all 13 tasks",
        "700: average of the 11 tasks without QA",
    ]
    assert len(averages["700: average of all 13 tasks"]) == 13
    eleven = averages["700: average of the 11 tasks without QA"]
    assert set(eleven) == {f"700/{name}" for name in SYNTHETIC}
    # Neither name is given to a mean over other tasks.
    assert [a.name for a in averages_of(sets[:11])] == ["500: average of the 11 tasks without QA"]
    assert [a.name for a in averages_of(sets[1:12])] == ["500: mean of these 11 tasks"]
    assert averages_of(sets[:1]) == []


def test_fewer_questions_than_rows_are_said(sources):
    measure = Measure(lengths=(600,), rows=30, seed=0, chat=False, count=count_words)
    sets, notes = build_sets(["qa_2"], sources, measure, explicit=False)
    assert len(sets[0].rows) == 12
    assert notes == ["600/qa_2: the data hold 12 questions that fit"]


def test_checksums_see_all_of_a_row(sources):
    task = rows_of(sources, "niah_single_1", 600, count=count_words)
    changed = dataclasses.replace(task.rows[0], answer_prefix="It is")
    assert dataclasses.replace(task, rows=(changed, task.rows[1])).checksum != task.checksum
