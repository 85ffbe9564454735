"""The harness's model class: against a plain forward pass, and in the harness itself, offline."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import models
from experiments.core.errors import UserError, run_main
from experiments.core.options import Slots, parse_policy
from experiments.core.storage import RowFile
from experiments.lm_eval.__main__ import main
from experiments.lm_eval.model import EvictedLM
from experiments.lm_eval.rolling import rolling_score
from experiments.lm_eval.scoring import Scorer, read_compression, stop_tokens
from restkv_jax.decode import CachePlan, Streaming, generate
from tests.restkv_jax.dense import logits_of

MODEL = str(Path(__file__).parents[1] / "fixtures/hf_tiny/qwen3_qknorm")
POLICIES = ["full", "streaming"]
CONTEXT = "The harbour of the small town lies behind a long wall of grey stone, and"
# Sums of at most 40 log-probabilities in float32 by two orders of summation, in nats.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def language_model():
    return models.load(MODEL)


@pytest.fixture(scope="module")
def scorer(language_model):
    return Scorer(language_model, [parse_policy(p) for p in POLICIES], Slots(12))


def harness_model(scorer, label, max_length=128):
    rolling = rolling_score(
        scorer.model, parse_policy(label), Slots(12), evict_every=4, max_length=max_length
    )
    return EvictedLM(scorer, label, rolling=rolling, max_length=max_length)


def request(*args):
    return SimpleNamespace(args=args)


def plain(language_model, before, after):
    """Log-likelihood and greediness from one forward pass without any cache."""
    logits = np.asarray(logits_of(language_model.model, [*before, *after]), np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    rows = np.arange(len(before) - 1, len(before) + len(after) - 1)
    total = logprobs[rows, after].sum()
    return total, bool((logprobs[rows].argmax(-1) == after).all())


def test_loglikelihood_of_the_full_cache_is_a_plain_forward_pass(language_model, scorer):
    lm, encode = harness_model(scorer, "full"), language_model.tokenizer.encode
    asked = [
        (CONTEXT, " boats come in."),
        (CONTEXT + " ", "boats come in."),  # the space belongs to the continuation
        (CONTEXT, " x"),
        ("", "The harbour"),
        ("A wall", " of stone that is much longer than a piece of sixteen tokens at a time"),
    ]
    found = lm.loglikelihood([request(*pair) for pair in asked], disable_tqdm=True)
    assert found[0] == found[1]
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        whole = encode(context.rstrip() + context[len(context.rstrip()) :] + continuation)
        before = encode(context.rstrip()) if context else [lm.prefix_token_id]
        after = whole[len(before) :] if context else whole
        expected = plain(language_model, before, after)
        assert total == pytest.approx(expected[0], abs=TOLERANCE)
        assert greedy == expected[1]


def test_eviction_comes_after_the_context_and_before_the_continuation(language_model, scorer):
    # Streaming's kept set is known: a plain pass in which the last token of the context, and what
    # follows, see sinks and the last tokens alone.
    lm, encode = harness_model(scorer, "streaming"), language_model.tokenizer.encode
    before, after = encode(CONTEXT), encode(CONTEXT + " boats come in.")[len(encode(CONTEXT)) :]
    ((total, _),) = lm.loglikelihood([request(CONTEXT, " boats come in.")], disable_tqdm=True)
    evicted, columns = len(before) - 1, len(before) + len(after)
    assert evicted > 12
    seen = np.tril(np.ones((columns, columns), bool))
    seen[evicted:, 4 : evicted - 8] = False  # 4 sinks and the last 8 of 12 slots
    allowed = np.broadcast_to(seen, (len(language_model.model.layer_specs), 1, 1, *seen.shape))
    logits = np.asarray(logits_of(language_model.model, [*before, *after], allowed), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(before) - 1, columns - 1)
    assert total == pytest.approx(logprobs[rows, after].sum(), abs=TOLERANCE)
    assert abs(total - plain(language_model, before, after)[0]) > 10 * TOLERANCE


def test_only_with_the_token_held_back_do_answers_of_one_token_depend_on_the_policy(language_model):
    encode = language_model.tokenizer.encode
    before, after = tuple(encode(CONTEXT)), tuple(encode(" x")[:1])
    policies = [parse_policy(p) for p in POLICIES]
    for first_token, same in (("prefill", True), ("evicted", False)):
        scorer = Scorer(language_model, policies, Slots(12), first_token=first_token)
        totals = [dict(scorer.pairs(p, [(before, after)]))[before, after][0] for p in POLICIES]
        assert (abs(totals[0] - totals[1]) < TOLERANCE) == same


def test_one_prefill_serves_all_policies_and_continuations(language_model, monkeypatch, tmp_path):
    from experiments.lm_eval import scoring

    calls, prefill = [], scoring.prefill

    def counted(model, tokens, valid, *, plans):
        calls.append(len(plans))
        return prefill(model, tokens, valid, plans=plans)

    monkeypatch.setattr(scoring, "prefill", counted)
    notes = {label: RowFile(tmp_path / f"{label}.jsonl") for label in POLICIES}
    policies = [parse_policy(p) for p in POLICIES]
    scorer = Scorer(language_model, policies, Slots(12), compression=notes)
    pairs = [(tuple(range(5, 25)), (i, i + 1)) for i in (30, 40, 30)] + [((7,), (8,))]
    for label in POLICIES:
        assert len(dict(scorer.pairs(label, pairs))) == 3
    assert calls == [2, 2]
    # 19 tokens were prefilled, one is held back; a context of one token cannot hold one back.
    full, streaming = (read_compression(notes[label]) for label in POLICIES)
    assert (full.contexts, full.evicted, full.tokens, full.kept) == (2, 0, 10.0, 10.0)
    assert (streaming.contexts, streaming.evicted, streaming.kept) == (2, 1, 6.5)
    assert streaming.factor == pytest.approx(10 / 6.5)


def test_long_contexts_lose_their_beginning(language_model, scorer):
    lm = harness_model(scorer, "full", max_length=16)
    ((total, _),) = lm.loglikelihood([request(CONTEXT, " boats")], disable_tqdm=True)
    whole = language_model.tokenizer.encode(CONTEXT + " boats")
    after = whole[len(language_model.tokenizer.encode(CONTEXT)) :]
    expected, _ = plain(language_model, whole[-16 : -len(after)], after)
    assert total == pytest.approx(expected, abs=TOLERANCE)


def test_rolling_windows_do_not_overlap(language_model, scorer):
    lm = harness_model(scorer, "full", max_length=16)
    (total,) = lm.loglikelihood_rolling([request(CONTEXT)])
    ids = [lm.prefix_token_id, *language_model.tokenizer.encode(CONTEXT, add_bos=False)]
    expected, done = 0.0, 1
    while done < len(ids):
        end = min(done + 15, len(ids))
        start = max(end - 16, 0)
        expected += plain(language_model, ids[start:done], ids[done:end])[0]
        done = end
    assert total == pytest.approx(expected, abs=TOLERANCE)


def test_windows_of_whole_texts_count_as_compressed(language_model, tmp_path):
    notes = {"streaming": RowFile(tmp_path / "notes.jsonl")}
    policies = [parse_policy("streaming")]
    noting = Scorer(language_model, policies, Slots(12), compression=notes)
    text = f"{CONTEXT} boats come in when the wind is good."
    harness_model(noting, "streaming", max_length=42).loglikelihood_rolling([request(text)])
    tokens = 1 + len(language_model.tokenizer.encode(text, add_bos=False))
    rows = notes["streaming"].load()
    # The second window begins as early as it may, with tokens that do not count again.
    assert [row["tokens"] for row in rows] == [42, 42]
    assert 42 < tokens < 84
    # 16 slots are filled, then each further token finds 12 to 15 of them taken.
    assert [row["kept"] for row in rows] == [12 + (42 - 12 - 1) % 4 + 1] * 2 == [14, 14]
    assert read_compression(notes["streaming"]).factor == 3.0


def test_generation_ends_at_the_first_end_string(language_model, scorer):
    lm, tokenizer = harness_model(scorer, "streaming"), language_model.tokenizer
    prompt = tokenizer.encode(CONTEXT)
    plan = CachePlan(policy=Streaming(), budget=12, headroom=20)
    free = Scorer(language_model, [parse_policy("streaming")], Slots(12), first_token="prefill")
    expected = generate(language_model.model, [prompt], plan=plan, max_new_tokens=20)
    ids = free.generation("streaming", tuple(prompt), tokens=20, stop_ids=())
    assert ids == expected.rows()[0]
    (whole,) = lm.generate_until([request(CONTEXT, {"until": [], "max_gen_toks": 12})])
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = lm.generate_until([request(CONTEXT, {"until": [stop], "max_gen_toks": 12})])
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(UserError, match="sampling"):
        lm.generate_until([request(CONTEXT, {"do_sample": True})])


def test_stop_tokens_are_those_that_hold_an_end_string():
    texts = ["a", "b\n", "\n\n", "ab", "Q:"]
    assert stop_tokens(["\n", "Q"], 5, lambda ids: texts[ids[0]]) == (1, 2, 4)
    assert stop_tokens([], 5, lambda ids: texts[ids[0]]) == ()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A multiple-choice task and a generation task, with their data, in a folder."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"{CONTEXT} {i} boats", "choices": ["come in", "go out"], "label": i % 2}
        for i in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
    (folder / "boats.yaml").write_text(
        f"""task: boats{shared}output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
"""
    )
    return folder


def run(tasks, out, *extra):
    arguments = ["--model", MODEL, "--out", str(out), "--data", str(tasks), "--budget", "12"]
    arguments += ["--tasks", "boats", "--policy", "full", "--policy", "streaming"]
    return run_main(lambda: main([*arguments, *extra]))


# The harness's own: its data library and its SQLite files.
@pytest.mark.filterwarnings("ignore")
def test_a_run_in_the_harness_offline(tasks, tmp_path, capsys, monkeypatch, language_model):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "run"
    assert run(tasks, out) == 0
    printed = capsys.readouterr().out
    assert "effective compression" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["n"]["streaming"] == {"boats acc": 3}
    # The harness's accuracy again, from plain forward passes.
    encode, right = language_model.tokenizer.encode, []
    for i in range(3):
        before = encode(f"{CONTEXT} {i} boats")
        totals = []
        for choice in ("come in", "go out"):
            after = encode(f"{CONTEXT} {i} boats {choice}")[len(before) :]
            totals.append(plain(language_model, before, after)[0])
        right.append(int(np.argmax(totals)) == i % 2)
    assert result["score"]["full"]["boats acc"] == pytest.approx(100 * np.mean(right), abs=0.01)
    harness = json.loads((out / "harness.json").read_text())
    assert math.isclose(harness["full"]["boats"]["acc,none"], np.mean(right))
    compression = json.loads((out / "compression.json").read_text())
    assert compression["streaming"]["kept slots"] == "12.0"
    assert compression["full"]["compression"] == "1.00x"
    assert sorted(path.name for path in (out / "requests").glob("*.db")) == sorted(
        path.name for path in (out / "requests").glob("*_rank0.db")
    )
    assert len(list((out / "requests").glob("*.db"))) == 2

    # Again: nothing is asked, everything is reported, compression included.
    monkeypatch.setattr(Scorer, "pairs", None)
    before = (out / "result.json").read_bytes()
    assert run(tasks, out) == 0
    assert "effective compression" in capsys.readouterr().out
    assert (out / "result.json").read_bytes() == before
    assert json.loads((out / "compression.json").read_text()) == compression
    assert run(tasks, out, "--budget", "16") == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--data", "/no/such"], "/no/such"),
        (["--policy", "h3o"], "h3o"),
        (["--max-length", "99999"], "--max-length 99999: the model holds 40960"),
    ],
)
def test_bad_input_is_one_line(tasks, tmp_path, capsys, monkeypatch, extra, culprit):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert run(tasks, tmp_path / "run", *extra) == 2
    error = capsys.readouterr().err
    assert culprit in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
