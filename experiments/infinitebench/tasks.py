"""The 12 tasks: prompts in our own words, generation lengths, metrics."""

from __future__ import annotations

import dataclasses

from experiments.core.tasks import SetSpec


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the 12 tasks.

    Attributes:
        prompt: template of the prompt.
        max_new_tokens: length of the generation.
        metric: of `metrics.METRICS`.
        prefix: how the answer begins.
    """

    prompt: str
    max_new_tokens: int
    metric: str
    prefix: str = ""


_BOOK = "Read the book, then answer.\n\n{context}\n\n"

TASKS: dict[str, Task] = {
    "passkey": Task(
        "A pass key is hidden in a long text of no meaning. Find it and remember it.\n\n{context}"
        "\n\n{input}",
        15,
        "first_integer",
        "The pass key is",
    ),
    "number_string": Task(
        "A row of digits is hidden in a long text of no meaning. Find it and remember it.\n\n"
        "{context}\n\n{input}",
        20,
        "first_integer",
        "The row of digits is",
    ),
    "kv_retrieval": Task(
        "The JSON object below maps keys to values. Look one of them up.\n\n{context}\n\n{input}",
        80,
        "contains_word",
        "Its value is",
    ),
    "math_find": Task(
        "Look for one number in the list below.\n\n{context}\n\n{input}",
        # The official scripts allow 3, too few where a token is a digit.
        6,
        "first_number",
        "It is",
    ),
    "math_calc": Task(
        "Calculate this expression from left to right. Write down the result after every single "
        "operation, separated by commas.\n\n{context}\n\n{input}",
        # The official scripts allow 30,000.
        2048,
        "running_results",
    ),
    "code_run": Task(
        "Below are Python functions that add or subtract a number, or call each other.\n\n"
        "{context}\n\n{input}",
        # The official scripts allow 5, too few where a token is a digit.
        10,
        "last_integer",
        "The value is",
    ),
    "code_debug": Task(
        "One function of the project below was given an obvious error on purpose. Find out which "
        "one.\n\n{context}\n\n{input}",
        5,
        "debug_choice",
        "The answer is:",
    ),
    "longbook_sum_eng": Task(
        "Read the book, then summarise it.\n\n{context}\n\n{input}", 1200, "summary_rouge"
    ),
    "longbook_choice_eng": Task(_BOOK + "{input}", 40, "letter_choice", "The answer is"),
    "longbook_qa_eng": Task(_BOOK + "Be as brief as you can. {input}", 40, "word_f1"),
    "longbook_qa_chn": Task(
        "请阅读下面的书，然后尽量简短地回答问题。\n\n{context}\n\n问题：{input}",
        40,
        "character_f1",
        "答案：",
    ),
    "longdialogue_qa_eng": Task(
        "In the script below, the name of one character was replaced by $$MASK$$ wherever it "
        "stands. Say whose name it is.\n\n{context}\n\n{input}",
        40,
        "contains_name",
        "The name is",
    ),
}

# Not among the tasks that are run unless they are named: few cells would be anything but this one.
ONLY_IF_NAMED = ("math_calc",)


def make_spec(name: str, set_name: str, *, chat: bool) -> SetSpec:
    """How a task is asked and scored."""
    task = TASKS[name]
    return SetSpec(
        name=set_name,
        prompt=task.prompt,
        max_new_tokens=task.max_new_tokens,
        metric=task.metric,
        chat=chat,
    )
