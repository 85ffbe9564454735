"""The 16 English sets of LongBench: prompts, generation lengths, metrics.

The prompts here say what the official ones say in words of our own. `official_prompts` reads the
official ones, and the generation lengths, from an installed `lm_eval` package.
"""

from __future__ import annotations

import dataclasses
import re

from experiments.core.harness import read_task, task_folder, unreadable
from experiments.core.tasks import SetSpec

_PASSAGE_QA = (
    "Several passages follow. Use them to answer the question at the end; reply with nothing but "
    "the answer.\n\n{context}\n\nThe passages end here. Reply with nothing but the answer to "
    "this question.\n\nQuestion: {input}\nAnswer:"
)


def _few_shot(
    name: str, prompt: str, length: int, metric: str, stop_at_newline: bool = False
) -> SetSpec:
    # The official code wraps no chat template around a few-shot prompt and scores one line.
    return SetSpec(
        name=name,
        prompt=prompt,
        max_new_tokens=length,
        metric=metric,
        chat=False,
        first_line_only=True,
        stop_at_newline=stop_at_newline,
    )


_SPECS = (
    SetSpec(
        name="narrativeqa",
        prompt=(
            "Below is a story (a book or the script of a film), then a question about it. Keep "
            "the answer short, one phrase where that is enough, and do not explain it.\n\n"
            "Story: {context}\n\nThat was the story. Answer in as few words as you can, "
            "without explaining.\n\nQuestion: {input}\n\nAnswer:"
        ),
        max_new_tokens=128,
        metric="qa_f1",
    ),
    SetSpec(
        name="qasper",
        prompt=(
            "Read this research paper and answer a question about it in one short phrase or "
            "sentence, without explaining. Reply yes or no to a question that asks for it, and "
            "unanswerable where the paper does not tell.\n\nPaper: {context}\n\nThat was the "
            "paper. Reply with one short phrase or sentence, with yes or no, or with "
            "unanswerable; do not explain.\n\nQuestion: {input}\n\nAnswer:"
        ),
        max_new_tokens=128,
        metric="qa_f1",
    ),
    SetSpec(
        name="multifieldqa_en",
        prompt=(
            "Here is a text. A question about it follows; keep the reply brief.\n\n{context}\n\n"
            "Using the text, reply to the question with the bare answer.\n\n"
            "Question: {input}\nAnswer:"
        ),
        max_new_tokens=64,
        metric="qa_f1",
    ),
    SetSpec(name="hotpotqa", prompt=_PASSAGE_QA, max_new_tokens=32, metric="qa_f1"),
    SetSpec(name="2wikimqa", prompt=_PASSAGE_QA, max_new_tokens=32, metric="qa_f1"),
    SetSpec(name="musique", prompt=_PASSAGE_QA, max_new_tokens=32, metric="qa_f1"),
    SetSpec(
        name="gov_report",
        prompt=(
            "This is a government report. Summarise it on one page.\n\nReport:\n{context}\n\n"
            "Summarise this report on one page.\n\nSummary:"
        ),
        max_new_tokens=512,
        metric="rouge_l",
    ),
    SetSpec(
        name="qmsum",
        prompt=(
            "This is the transcript of a meeting, followed by a request about it. Respond in a "
            "sentence or a few.\n\nTranscript:\n{context}\n\nRespond to this request about "
            "the meeting in a sentence or a few.\n\nRequest: {input}\nResponse:"
        ),
        max_new_tokens=512,
        metric="rouge_l",
    ),
    SetSpec(
        name="multi_news",
        prompt=(
            "These news articles belong together. Summarise all of them on one page.\n\n"
            "Articles:\n{context}\n\nSummarise all of these articles on one page.\n\nSummary:"
        ),
        max_new_tokens=512,
        metric="rouge_l",
    ),
    _few_shot(
        "trec",
        "Name the type of the last question, in the way these examples do.\n\n{context}\n{input}",
        64,
        "classification",
    ),
    _few_shot(
        "triviaqa",
        "Each passage is followed by a question; reply with the bare answer, as in these "
        "examples.\n\n{context}\n\n{input}",
        32,
        "qa_f1",
    ),
    _few_shot(
        "samsum",
        "Sum up the last dialogue in a few brief sentences, as in these examples.\n\n"
        "{context}\n\n{input}",
        128,
        "rouge_l",
        stop_at_newline=True,
    ),
    SetSpec(
        name="passage_count",
        prompt=(
            "The numbered paragraphs below come from an encyclopedia, and some occur more than "
            "once. Read them all and find out how many different paragraphs there are when each "
            "is counted once.\n\n{context}\n\nHow many different paragraphs are there? Reply "
            "with a bare number (1, 2, 3 or another).\n\nThe number of different paragraphs is:"
        ),
        max_new_tokens=32,
        metric="count",
    ),
    SetSpec(
        name="passage_retrieval_en",
        prompt=(
            "You see 30 numbered paragraphs of an encyclopedia and then a summary of one of "
            "them. Find out which one it sums up.\n\n{context}\n\nThe summary:\n\n{input}\n\n"
            'Reply with that paragraph\'s number, written as "Paragraph 1", "Paragraph 2" and '
            "so on.\n\nThe summary belongs to:"
        ),
        max_new_tokens=32,
        metric="retrieval",
    ),
    SetSpec(
        name="lcc",
        prompt="Continue this code by one line. \n{context}The line that follows:\n",
        max_new_tokens=64,
        metric="code_similarity",
        chat=False,
    ),
    SetSpec(
        name="repobench-p",
        prompt="Continue this code by one line. \n{context}{input}The line that follows:\n",
        max_new_tokens=64,
        metric="code_similarity",
        chat=False,
    ),
)

LONGBENCH_SETS: dict[str, SetSpec] = {spec.name: spec for spec in _SPECS}


def official_prompts(names: list[str]) -> dict[str, SetSpec]:
    """The sets with the official wordings and generation lengths.

    They are read from the task files of the installed `lm_eval` package and taken as they stand
    there. For six sets that package spells the white space at the end of the prompt, or between
    context and question, otherwise than the benchmark's authors (triviaqa, samsum,
    passage_count, passage_retrieval_en, lcc, repobench-p); no word differs.

    Args:
        names: names of LongBench sets.

    Returns:
        Name to specification; metric, chat and line rules are those of `LONGBENCH_SETS`.

    Raises:
        UserError: if `lm_eval` is missing, or one of its task files is not understood.
    """
    folder = task_folder("longbench")
    result = {}
    for name in names:
        try:
            task = read_task(folder / f"{name}.yaml")
            prompt = from_jinja(task["doc_to_text"])
            length = int(task["generation_kwargs"]["max_gen_toks"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise unreadable(f"the prompt of {name}", error) from error
        result[name] = dataclasses.replace(
            LONGBENCH_SETS[name], prompt=prompt, max_new_tokens=length
        )
    return result


def from_jinja(template: str) -> str:
    """Rewrites lm_eval's `{{context}}` and `{{question}}` as our `{context}` and `{input}`.

    Raises:
        ValueError: if the template holds any other expression or statement.
    """
    fields = {"context": "{context}", "question": "{input}", "input": "{input}"}

    def rewrite(match: re.Match[str]) -> str:
        name = match.group(1).strip()
        if name not in fields:
            raise ValueError(f"unknown field {name!r} in the template")
        return fields[name]

    result = re.sub(r"\{\{(.*?)\}\}", rewrite, template)
    if "{%" in result or "{#" in result or "{context}" not in result:
        raise ValueError("the template is not a plain text with fields")
    return result
