"""Two small tasks in the harness's own format, from texts that every Python carries.

They are for runs without a network, and no known benchmark. Contexts are longer than a budget, so
that eviction has something to do.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from experiments.core.results import fingerprint
from experiments.core.storage import write_atomic
from experiments.longbench.stdlib_text import code_files, prose_sentences

TASKS = ("offline_last_word", "offline_next_line")
_ROWS = 100
_CONTEXT_WORDS = 400
_CONTEXT_LINES = 60
_CHOICES = 4
_WORD = re.compile(r"([a-z]{4,})\.")

_SHARED = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{context}}}}"
metadata:
  version: 1
"""
# The harness puts nothing between the context and the target of a log-likelihood.
_YAML = {
    "offline_last_word": """\
output_type: loglikelihood
doc_to_target: "{{' ' + target}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "offline_next_line": """\
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
target_delimiter: "\\n"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
}


def write_tasks(folder: Path, count: int = _ROWS) -> Path:
    """Writes the tasks' YAML files and rows, once.

    Args:
        folder: where they go, into a folder of their own that is named after their content.
        count: rows of each task.

    Returns:
        That folder.

    Raises:
        UserError: this Python carries no such texts, or the files cannot be written.
    """
    made = {
        "offline_last_word": last_words(count),
        "offline_next_line": next_lines(count),
    }
    folder = folder / f"lm_eval_offline-{fingerprint({'rows': made, 'yaml': _YAML})}"
    for name, docs in made.items():
        rows, yaml = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        if not rows.exists():  # a new file of the same content is another one to the data library
            write_atomic(rows, "".join(json.dumps(doc) + "\n" for doc in docs))
        shared = _SHARED.format(file=json.dumps(str(rows.absolute())))
        write_atomic(yaml, f"task: {name}\n{shared}{_YAML[name]}")
    return folder


def last_words(rows: int) -> list[dict[str, Any]]:
    """Passages whose last word has come before in them: a long context helps to guess it."""
    sentences = prose_sentences()
    lengths = [len(sentence.split()) for sentence in sentences]
    found = []
    for end, sentence in enumerate(sentences):
        first, words = end, lengths[end]
        while first > 0 and words < _CONTEXT_WORDS:
            first -= 1
            words += lengths[first]
        before = " ".join(sentences[first:end])
        match = _WORD.fullmatch(sentence.split()[-1])
        if words >= _CONTEXT_WORDS and match and re.search(rf"\b{match[1]}\b", before):
            found.append((before, sentence, match[1]))
    chosen = random.Random("offline_last_word").sample(found, min(rows, len(found)))
    return [
        {"context": f"{before} {sentence.removesuffix(f' {word}.')}", "target": word}
        for before, sentence, word in chosen
    ]


def next_lines(rows: int) -> list[dict[str, Any]]:
    """Source code, and four lines of the same file of which one comes next."""
    files = code_files()
    rng = random.Random("offline_next_line")
    docs: list[dict[str, Any]] = []
    while len(docs) < rows:
        lines = files[rng.choice(sorted(files))]
        full = {line.strip() for line in lines if len(line.strip()) > 12}
        at = rng.randrange(len(lines))
        right = lines[at].strip()
        if at < _CONTEXT_LINES or right not in full or len(full) < _CHOICES:
            continue
        wrong = rng.sample(sorted(full - {right}), _CHOICES - 1)
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        choices = sorted([right, *wrong])
        docs.append(
            {
                "context": "\n".join(lines[at - _CONTEXT_LINES : at]),
                "choices": [indent + choice for choice in choices],
                "label": choices.index(right),
            }
        )
    return docs
