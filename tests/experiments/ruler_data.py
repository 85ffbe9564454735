"""A folder of texts for RULER's tasks, all of them made up here, and counters of tokens."""

from __future__ import annotations

import itertools
import json
import random
import re

from experiments.core.tasks import fill_prompt


def count_words(spec, row):
    return len(whole(spec, row).split())


def count_pieces(spec, row):
    return len(re.findall(r"\w{1,4}|\s?[^\w\s]|\n", whole(spec, row)))


def whole(spec, row):
    """The prompt without a chat template."""
    return f"{fill_prompt(spec.prompt, row)}{spec.delimiter}{row.answer_prefix}"


def write_folder(folder):
    rng = random.Random(0)
    syllables = ["".join(pair) for pair in itertools.product("bdfklmnprstv", "aeiou")]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2500)})
    rng.shuffle(words)
    lists = {"noun": words[:1200], "adjective": words[1200:1700], "verb": words[1700:2000]}
    for kind, listed in lists.items():
        text = "\n".join([*listed, "two words", " padded"]) + "\n"
        (folder / f"wonderwords_{kind}list.txt").write_text(text)
    (folder / "words_alpha.txt").write_text(
        "".join(f"{a}{b}\n" for a, b in itertools.product(words[:200], words[200:400]))
    )
    (folder / "essays").mkdir()
    for essay in range(3):
        sentences = [
            " ".join(rng.choices(words, k=rng.randint(5, 15))).capitalize() + "."
            for _ in range(150)
        ]
        (folder / "essays" / f"{essay}.txt").write_text(" ".join(sentences))
    write_rows(folder / "squad_made_up.jsonl", squad_rows(words, rng))
    write_rows(folder / "hotpotqa_dev_made_up.jsonl", hotpot_rows(words, rng))
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def squad_rows(words, rng):
    rows = []
    for i in range(40):
        name, colour = words[2 * i], words[2 * i + 1]
        filler = " ".join(rng.choices(words, k=20))
        rows.append(
            {
                "id": str(i),
                "title": f"Article {i // 8}",
                "context": f"Some say {filler}. The colour of {name} is {colour}.",
                "question": f"What is the colour of {name}?",
                "answers": {"text": [colour, f"the {colour}", colour], "answer_start": [0, 0, 0]},
            }
        )
    return rows


def hotpot_rows(words, rng):
    rows = []
    for i in range(12):
        name, friend, town = words[500 + 3 * i : 503 + 3 * i]
        pages = {
            name.title(): [f"The friend of {name} is {friend}.", " That is all."],
            friend.title(): [f"The home of {friend} is {town}."],
            **{f"{w.title()} {i}": [f"{w.title()} grows in {i}."] for w in rng.sample(words, 8)},
        }
        titles = rng.sample(list(pages), len(pages))
        rows.append(
            {
                "_id": None,
                "question": f"What is the home of the friend of {name}?",
                "answer": town,
                "supporting_facts": [[name.title(), 0], [friend.title(), 0]],
                "context": [[title, pages[title]] for title in titles],
            }
        )
    return rows


def solve(task, prompt):
    """Answers from the prompt's text alone, as a model with the whole context could."""
    if task.startswith("niah"):
        names = re.findall(r"kept by ([^?.\n]*)\?", prompt)[-1]
        keys = names.replace(" and ", ", ").split(", ")
        return " ".join(v for k in keys for v in re.findall(rf"kept by {k} is (\S+)\.", prompt))
    if task == "vt":
        value = re.findall(r"hold the value (\d+) in the text above", prompt)[-1]
        holding = {value}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
            if source in holding:
                holding.add(name)
        return " ".join(holding)
    if task == "cwe":
        listed = prompt.split("\n\n")[-2]
        return " ".join(most_common(re.findall(r"\d+\. (\S+)", listed), 10))
    if task == "fwe":
        text = prompt.split("\n\n")[-2]
        return " ".join(most_common(re.findall(r"[a-z]+", text), 3))
    if task == "qa_1":
        name = re.findall(r"the colour of (\w+)\?", prompt)[-1]
        return re.findall(rf"The colour of {name} is (\w+)\.", prompt)[0]
    name = re.findall(r"the friend of (\w+)\?", prompt)[-1]
    friend = re.findall(rf"The friend of {name} is (\w+)\.", prompt)[0]
    return re.findall(rf"The home of {friend} is (\w+)\.", prompt)[0]


def most_common(words, count):
    """The most common words; a tie at the end would make the task undecidable."""
    numbers = dict.fromkeys(words, 0)
    for word in words:
        numbers[word] += 1
    ranked = sorted(numbers, key=numbers.__getitem__, reverse=True)
    assert numbers[ranked[count - 1]] > numbers[ranked[count]]
    return ranked[:count]
