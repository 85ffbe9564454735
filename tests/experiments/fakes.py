"""A tokenizer of characters, sets to ask, and an engine that needs no model."""

from experiments.core.prompts import Prompting
from experiments.core.runner import Answer
from experiments.core.tasks import Row, SetSpec

BOS, EOS, TURN_END = 0, 1, 2
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


def row(i=0):
    return Row(input=f"in {i}", context=f"text {i}", answers=(f"in {i}", "é"), length=3)


class CharTokenizer:
    """Code points, shifted by 3; ids below are special."""

    def __init__(self, chat=True, bos=True):
        self.has_chat_template = chat
        self.bos = bos

    def encode(self, text, *, add_bos=None, parse_special=True):
        ids = []
        while text:
            special = next(
                (i for i, s in enumerate(("<s>", "</s>", "<t>")) if text[:4][: len(s)] == s), None
            )
            if special is not None and parse_special:
                text = text[len(("<s>", "</s>", "<t>")[special]) :]
                ids.append(special)
            else:
                ids.append(ord(text[0]) + 3)
                text = text[1:]
        return [BOS, *ids] if (self.bos if add_bos is None else add_bos) else ids

    def decode(self, ids, *, skip_special=True):
        return "".join(chr(i - 3) for i in ids if i > 2)

    def apply_chat(self, messages, *, add_generation_prompt=True):
        (message,) = messages
        return f"<s>user: {message['content']}<t>" + ("bot: " if add_generation_prompt else "")


class FakeEngine:
    """Answers with the prompt's last characters and the policy's name; counts its calls.

    "full" keeps what it is to compress, other policies 12.5 slots.
    """

    def __init__(self, fail_after=None, error=KeyboardInterrupt):
        self.calls = []
        self.fail_after = fail_after
        self.error = error

    def answer(
        self,
        prompt_ids,
        *,
        policies,
        max_new_tokens,
        stop_ids,
        seed,
        min_new_tokens=0,
        context_tokens=None,
    ):
        if self.fail_after is not None and len(self.calls) == self.fail_after:
            raise self.error
        self.calls.append((tuple(prompt_ids), tuple(policies), seed))
        compressed = len(prompt_ids[:context_tokens])
        tail = [i for i in prompt_ids if i > 2][-5:]
        return {
            policy: Answer(
                token_ids=(tail + [ord(c) + 3 for c in f" é {policy} {seed}"])[:max_new_tokens],
                prefill_s=0.5,
                decode_s=0.25,
                kept_slots=compressed if policy == "full" else 12.5,
                cache_bytes=2048,
            )
            for policy in policies
        }
