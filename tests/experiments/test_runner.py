"""The loop: prompts of both protocols, one call per row, interruption and resumption."""

import contextlib
import dataclasses
import io
import json

import pytest

from experiments.core.errors import UserError
from experiments.core.progress import RunProgress
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.results import ResultStore
from experiments.core.runner import evaluate, generating, row_seed
from experiments.core.session import describe_sets, run_session
from experiments.core.storage import RowFile
from experiments.core.tasks import Row, SetSpec, TaskSet
from experiments.longbench.metrics import score_prediction
from tests.experiments.fakes import BOS, EOS, TURN_END, CharTokenizer, FakeEngine

POLICIES = ("full", "restkv")
CHAT = SetSpec(name="chat", prompt="Q: {context} {input}", max_new_tokens=20, metric="qa_f1")
PLAIN = SetSpec(
    name="plain",
    prompt="{context}",
    max_new_tokens=20,
    metric="rouge_l",
    chat=False,
    first_line_only=True,
    stop_at_newline=True,
)
OFFICIAL = Prompting(
    protocol="official", max_length=100, eos_ids=(EOS,), turn_end_ids=(TURN_END,), inst_style=True
)
RELEASED = Prompting(
    protocol="released", max_length=100, eos_ids=(EOS,), turn_end_ids=(TURN_END,), inst_style=True
)


def row(i=0):
    return Row(input=f"in {i}", context=f"text {i}", answers=(f"in {i}", "é"), length=3)


SETS = [
    TaskSet(spec=CHAT, rows=tuple(row(i) for i in range(3)), source="here"),
    TaskSet(spec=PLAIN, rows=tuple(row(i) for i in range(2)), source="here"),
]


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


def test_row_seeds_differ():
    seeds = {row_seed(s, n, i) for s in (0, 1) for n in ("a", "b") for i in (0, 1)}
    assert len(seeds) == 8


def session(folder, engine, sets=SETS, changes=None, policies=None, most_together=None):
    policies = policies or POLICIES
    made = []

    def make_engine():
        made.append(1)
        return engine

    tables = run_session(
        folder=folder,
        config={
            "sets": describe_sets(sets),
            "policies": dict.fromkeys(policies),
            **(changes or {}),
        },
        environment={"python": "x"},
        title="a title",
        sets=sets,
        policies=policies,
        make_ask=lambda: generating(make_engine(), CharTokenizer(), OFFICIAL, 3),
        score=score_prediction,
        most_together=most_together,
        progress=RunProgress(io.StringIO()),
    )
    return tables, len(made)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("run_meta.json", ".lock", "table.md")
    }


def test_one_call_serves_all_policies(tmp_path):
    engine = FakeEngine()
    tables, _ = session(tmp_path, engine)
    assert [policies for _, policies, _ in engine.calls] == [POLICIES] * 5
    assert tables[0].columns == ("set", "n", "full", "restkv")
    predictions = [
        json.loads(line) for line in (tmp_path / "pred/restkv/chat.jsonl").read_text().splitlines()
    ]
    assert [p["index"] for p in predictions] == [0, 1, 2]
    assert predictions[1]["answers"] == ["in 1", "é"]
    assert predictions[1]["pred"].startswith("bot:  é restkv")
    meta = json.loads((tmp_path / "run_meta.json").read_text())
    assert meta["finished"]
    assert len(meta["sessions"]) == 1
    assert meta["seconds"] >= 0
    assert meta["sessions"][0]["sources"] == {"chat": "here", "plain": "here"}
    assert meta["config"]["sets"]["chat"]["checksum"] == SETS[0].checksum
    assert "| chat | 3 |" in (tmp_path / "table.md").read_text()


def test_of_many_policies_only_differences_to_the_first_are_printed(tmp_path, monkeypatch):
    policies = tuple(f"p{i}" for i in range(7))
    monkeypatch.setattr(f"{__name__}.POLICIES", policies)
    *_, printed, _ = session(tmp_path, FakeEngine())[0]
    assert {row[1] for row in printed.rows} == {f"{policy} - p0" for policy in policies[1:]}
    assert "p6 - p5" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("rows", range(5))
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path, rows, error):
    session(tmp_path / "whole", FakeEngine())
    with pytest.raises(error):
        session(tmp_path / "parts", FakeEngine(fail_after=rows, error=error))
    assert not (tmp_path / "parts" / "result.json").exists()
    assert not json.loads((tmp_path / "parts" / "run_meta.json").read_text())["finished"]
    rest = FakeEngine()
    session(tmp_path / "parts", rest)
    assert len(rest.calls) == 5 - rows
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    meta = json.loads((tmp_path / "parts" / "run_meta.json").read_text())
    assert meta["finished"]
    assert len(meta["sessions"]) == 2


def test_policies_that_come_later_are_asked_alone(tmp_path):
    """And a run that is stopped while they are asked goes on with each cohort as it was."""
    more = ("h2o", *POLICIES, "tova")
    for folder, stops in (("whole", [5]), ("parts", [2, 3])):
        with contextlib.suppress(KeyboardInterrupt):
            session(tmp_path / folder, FakeEngine(fail_after=stops[0]))
        asked = []
        for stop in (*stops[1:], None):
            engine = FakeEngine(fail_after=stop)
            with contextlib.suppress(KeyboardInterrupt):
                session(tmp_path / folder, engine, policies=more)
            asked += [policies for _, policies, _ in engine.calls]
        assert asked.count(("h2o", "tova")) == 5
        assert asked.count(POLICIES) == 5 - stops[0]
        assert len(asked) == 10 - stops[0]
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert list(json.loads((tmp_path / "whole/result.json").read_text())["score"]) == list(more)
    # What is there already is not left out.
    with pytest.raises(UserError, match=r"differs in: policies\.h2o, policies\.tova"):
        session(tmp_path / "whole", None)
    with pytest.raises(UserError, match="differs in: seed"):
        session(tmp_path / "whole", None, policies=(*more, "snapkv"), changes={"seed": 4})


@pytest.mark.parametrize("stop", [None, 2, 7])
def test_of_many_policies_some_are_asked_all_rows_before_others(tmp_path, stop):
    many = (*POLICIES, "h2o", "tova", "knorm")
    session(tmp_path / "whole", FakeEngine(), policies=many)
    asked = []
    for fail_after in (stop, None)[stop is None :]:
        engine = FakeEngine(fail_after=fail_after)
        with contextlib.suppress(KeyboardInterrupt):
            session(tmp_path / "groups", engine, policies=many, most_together=2)
        asked += [policies for _, policies, _ in engine.calls]
    groups = [many[:2], many[2:4], many[4:]]
    first, second = (len(task.rows) for task in SETS)
    of_rows = [
        *(g for g in groups for _ in range(first)),
        *(g for g in groups for _ in range(second)),
    ]
    assert asked == of_rows
    assert files(tmp_path / "whole") == files(tmp_path / "groups")


def test_a_kill_in_the_middle_of_a_line_resumes_to_the_same_bytes(tmp_path):
    session(tmp_path / "whole", FakeEngine())
    for cut in (1, 30, 200):
        folder = tmp_path / f"cut{cut}"
        with pytest.raises(KeyboardInterrupt):
            session(folder, FakeEngine(fail_after=3))
        # As if killed while the second policy's last row was being written.
        path = folder / "pred/restkv/chat.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        rest = FakeEngine()
        session(folder, rest)
        assert rest.calls[0][1] == POLICIES  # of the cut row, whose first policy stays as it is
        predictions = {k: v for k, v in files(folder).items() if not k.startswith("timing/")}
        assert predictions.items() <= files(tmp_path / "whole").items()


def test_a_finished_run_needs_no_engine(tmp_path):
    session(tmp_path, FakeEngine())
    before = files(tmp_path)
    _, made = session(tmp_path, None)
    assert made == 0
    assert files(tmp_path) == before


def test_another_configuration_is_refused_before_the_engine_is_built(tmp_path):
    session(tmp_path, FakeEngine())
    before = files(tmp_path)
    for changes in ({"seed": 4}, {"sets": describe_sets(SETS[:1])}):
        with pytest.raises(UserError, match="another configuration"):
            session(tmp_path, None, changes=changes)
    assert files(tmp_path) == before


def test_an_engine_that_refuses_leaves_nothing_behind(tmp_path):
    def refuse():
        raise UserError("--budget 7: too small")

    with pytest.raises(UserError, match="too small"):
        run_session(
            folder=tmp_path / "out",
            config={},
            environment={},
            title="",
            sets=SETS,
            policies=POLICIES,
            make_ask=refuse,
            score=score_prediction,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    session(tmp_path / "whole", FakeEngine())
    append, count = RowFile.append, [0]

    def append_until_full(self, data):
        count[0] += 1
        if count[0] > 6:
            raise UserError(f"cannot write {self.path}: No space left on device")
        append(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", append_until_full)
        with pytest.raises(UserError, match="No space"):
            session(tmp_path / "parts", FakeEngine())
    session(tmp_path / "parts", FakeEngine())
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_a_bar_counts_the_rows_of_every_cohort():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with RunProgress(stream) as progress:
        progress.start_set("chat", 3, [2, 1])
        for _ in range(3):
            progress.row_done()
        progress.end_set()
    assert "6/6" in stream.getvalue()


def test_progress_lines_where_there_is_no_terminal(tmp_path):
    stream = io.StringIO()
    config = {"x": 1}
    progress = RunProgress(stream)

    def asked_by(engine):
        return generating(engine, CharTokenizer(), OFFICIAL, 0)

    with ResultStore.open(tmp_path, config) as store:
        store.write_meta({})
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(
                SETS[:1], [POLICIES], ask=asked_by(FakeEngine(2)), store=store, progress=progress
            )
    with ResultStore.open(tmp_path, config) as store:
        evaluate(SETS, [POLICIES], ask=asked_by(FakeEngine()), store=store, progress=progress)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("chat: 3 rows in ")
    assert lines[0].endswith("2 from an earlier run")
    assert lines[1].startswith("plain: 2 rows in ")
    assert lines[1].endswith(" s")
