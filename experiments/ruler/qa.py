"""Questions on a passage among many others: SQuAD (qa_1) and HotpotQA (qa_2)."""

from __future__ import annotations

from experiments.core.fitting import largest_fit
from experiments.core.tasks import Row
from experiments.ruler.draws import Draw, depths_of, make_row
from experiments.ruler.questions import Question, Questions

# A passage has this many tokens at the very least.
_LEAST_TOKENS = 8


def make_qa(questions: Questions, question: Question, draw: Draw) -> Row | None:
    """Hides a question's own passages among others, in an order that is drawn.

    Passages that belong to the same article, or that came with the question, are the first to be
    added, then any others; where the data end they start over. The last one is cut where the
    length ends.

    Returns:
        The row, or None if the question's own passages do not fit.
    """
    rng, wording = draw.rng, draw.wordings.qa
    texts = questions.passages
    near = rng.sample(question.near, len(question.near))
    known = {*question.own, *question.near}
    most = draw.limit // _LEAST_TOKENS + 1
    far = [i for i in rng.sample(range(len(texts)), min(most, len(texts))) if i not in known]
    others = [*near, *far]
    if not others:
        return None
    places = [rng.random() for _ in range(len(question.own) + most + 1)]

    def build(count: int, words: int = 0) -> Row:
        chosen = [texts[i] for i in question.own]
        chosen += [texts[others[i % len(others)]] for i in range(count)]
        if words:
            last = texts[others[count % len(others)]]
            chosen.append(" ".join(last.split(" ")[:words]))
        order = sorted(range(len(chosen)), key=places.__getitem__)
        shown = [
            wording.passage.format(number=n, text=chosen[i]) for n, i in enumerate(order, start=1)
        ]
        context = "\n\n".join(shown)
        marks = [shown[order.index(i)] for i in range(len(question.own))]
        return make_row(
            context,
            wording.asking.question.format(query=question.text),
            wording.asking.prefix,
            question.answers,
            depths_of(context, marks),
        )

    count = largest_fit(lambda count: draw.tokens(build(count)), draw.limit, most=most)
    if count is None:
        return None
    last = texts[others[count % len(others)]]
    words = largest_fit(
        lambda words: draw.tokens(build(count, words)), draw.limit, most=last.count(" ") + 1
    )
    return build(count, words or 0)
