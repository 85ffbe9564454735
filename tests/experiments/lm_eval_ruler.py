"""lm_eval's own makers of RULER's prompts, without what their modules import, and with their draws
scripted: given what a row of ours holds, they must write the row's prompt.

None of its texts stand here.
"""

from __future__ import annotations
import __future__

import ast
import functools
import re
import string
from types import SimpleNamespace

import numpy as np

from experiments.core.harness import task_folder


class Script:
    """Stands for a module `random`: what is drawn is written down before."""

    def __init__(self, *, samples=(), orders=(), names=()):
        self._samples, self._orders, self._names = iter(samples), iter(orders), iter(names)

    def Random(self, seed):
        return self

    def sample(self, population, k):
        return list(next(self._samples))

    def choices(self, letters, k):
        return next(self._names)

    def shuffle(self, items):
        order = next(self._orders)
        if order is not None:
            items[:] = order


def load(file, **names):
    """The functions and plain constants of a module, in a namespace with these names."""
    tree = ast.parse((task_folder("ruler") / file).read_text(encoding="utf-8"))
    kept = {"CONFIG", "TEMPLATE", "DOCUMENT_PROMPT", "SEED", "RANDOM_SEED"}
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in kept)
    ]
    space = {
        "cache": functools.cache,
        "lru_cache": functools.lru_cache,
        "np": np,
        "re": re,
        "string": string,
        "tqdm": lambda items, **_: items,
        "print": lambda *_: None,
        **names,
    }
    # Annotations name what is not imported.
    code = compile(tree, file, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, space)
    return space


def tokenizer(count):
    return lambda text: SimpleNamespace(input_ids=[0] * count)


def pattern(template, *groups, **named):
    """A template as a regular expression: its fields are groups, those without a name in turn."""
    parts, turn = [], iter(groups)
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if name is not None:
            parts.append(named.get(name, r"([\w-]+)") if name else next(turn))
    return "".join(parts)


def assignments(wording, text):
    """Pairs of a variable and what it is assigned, of a text of variable tracking."""
    first = re.findall(pattern(wording.first, "([A-Z]+)", r"(\d+)"), text)
    return first + re.findall(pattern(wording.then, "([A-Z]+)", "([A-Z]+)"), text)


def items(item, text):
    """Pairs of a number and a word, of a list of common words."""
    return re.findall(pattern(item, r"(\d+)", r"(\S+)"), text)


def niah(wordings, needles, row, *, sentences=None):
    """The prompt and the answer's beginning of a row with needles.

    Args:
        wordings: the official ones.
        needles: the task.
        row: a row of ours.
        sentences: of the essay.
    """
    kind = needles.value
    form = pattern(wordings.niah.needle.replace("{kind}", kind))
    key_of = {value: key for key, value in re.findall(form, row.context)}
    order = [match.group(0) for match in re.finditer(form, row.context)]
    others = []
    if needles.haystack == "needle":
        (asked,) = (key_of[answer] for answer in row.answers)
        others = [(key, value) for value, key in key_of.items() if key != asked]
        order = [text for text in order if asked in text]
        key_of = {value: key for value, key in key_of.items() if key == asked}
    keys = list(dict.fromkeys(key_of.values()))
    # All that is drawn, as it is drawn there: each key and its values.
    drawn = []
    for key in keys:
        drawn += [key, *(value for value, own in key_of.items() if own == key)]
    drawn += [text for pair in others for text in pair]
    draws = iter(drawn)
    units = row.context.split("\n")
    if needles.haystack == "essay":
        places, count = [], len(sentences)
        for before in re.split(form.replace("(", "(?:"), row.context)[:-1]:
            places.append((places[-1] if places else 0) + sum(map(before.count, ".?!")))
        # In percent, and in the middle of what is rounded down to a place.
        samples = [[100 * (place + 0.5) / count for place in places]]
    else:
        samples = [[units.index(text) for text in order]]
        count = len(units) - len(order)
    asked = list(dict.fromkeys(key_of[answer] for answer in row.answers))
    samples.append([keys.index(key) for key in asked])
    space = load(
        "prepare_niah.py",
        random=Script(samples=samples, orders=[order]),
        DEPTHS=[],
        sent_tokenize=lambda text: sentences,
    )
    space["generate_random"] = lambda kind: next(draws)
    template = load("niah_utils.py")["TEMPLATE"]
    like = {"noise": "repeat"}.get(needles.haystack, needles.haystack)
    haystack = [] if like == "essay" else space["get_haystack"](like)
    made = space["generate_input_output"](
        count,
        haystack,
        type_haystack=like,
        num_needle_k=len(keys),
        type_needle_k=f"{needles.key}s",
        num_needle_v=needles.values,
        type_needle_v=f"{kind}s",
        template=template,
        num_needle_q=needles.queries,
    )
    space["generate_input_output"] = lambda *_, **__: made
    (document,) = space["generate_samples"](
        haystack,
        tokenizer(72),
        max_seq_length=200,
        template=template,
        type_haystack=like,
        type_needle_k=f"{needles.key}s",
        type_needle_v=f"{kind}s",
        num_needle_k=needles.keys,
        num_needle_v=needles.values,
        num_needle_q=needles.queries,
        num_samples=1,
    )
    return document["input"], document["gen_prefix"]


def vt(wordings, row):
    """The prompt and the answer's beginning of a row of variable tracking."""
    wording = wordings.vt
    (noise,) = wording.noise
    example, text = row.context.split(wording.asking.intro)[1:]

    def make(text, *, example):
        pairs = assignments(wording, text)
        chain = [wording.first.format(*pairs[0]), *(wording.then.format(*p) for p in pairs[1:])]
        places = [text[: text.index(assignment)].count(noise) for assignment in chain]
        space = load(
            "vt_utils.py", random=Script(names=[name for name, _ in pairs], samples=[places])
        )
        space["np"] = SimpleNamespace(random=SimpleNamespace(randint=lambda *_: pairs[0][1]))
        return space["generate_input_output"](text.count(noise), 1, 4, is_icl=example)

    asked, answers = make(example, example=True)
    made = make(text, example=False)
    space = load("vt_utils.py", random=Script())
    space["generate_input_output"] = lambda *_, **__: made
    # Which letters stand in for those of the example is drawn once more for each row.
    space["randomize_icl"] = lambda text: text
    (document,) = space["sys_vartrack_w_noise_random"](
        tokenizer(10), 1, 50, icl_example={"input": asked, "outputs": answers}
    )
    return document["input"], document["gen_prefix"]


def cwe(row, item):
    """The example, and the prompt with the answer's beginning, of a row of common words."""
    lists = []
    for number, word in items(item, row.context):
        if number == "1":
            lists.append([])
        lists[-1].append(word)
    shown, answer, listed = lists
    samples = [list(dict.fromkeys([*answer, *shown])), list(dict.fromkeys([*row.answers, *listed]))]
    rng = Script(orders=[shown, listed])
    space = load("cwe_utils.py", random=Script(samples=samples), RNG=rng, WORDS=[])
    example, text, answers = space["generate_input_output"](len(samples[1]), 2048)
    assert answers == list(row.answers)
    return example, text


def fwe(row, words):
    """The prompt with the answer's beginning of a row of frequent words."""
    vocabulary = ["...", *dict.fromkeys(word for word in words if word != "...")]
    script = Script(names=vocabulary, orders=[vocabulary, words, words])
    space = load("fwe_utils.py", random=script, zeta=lambda alpha: np.pi**2 / 6)
    text, _, _ = space["generate_input_output"](
        10**6, tokenizer(1), num_words=len(words), vocab_size=len(vocabulary)
    )
    return text


def qa(passages, question, answers):
    """The prompt and the answer's beginning of a question on these passages."""
    questions = [{"query": question, "outputs": answers, "context": list(range(len(passages)))}]
    space = load("qa_utils.py", random=Script(orders=[None] * 3))
    (document,) = space["generate_samples"](
        tokenizer(0), passages, questions, max_seq_length=32, num_samples=1
    )
    return document["input"], document["gen_prefix"]
