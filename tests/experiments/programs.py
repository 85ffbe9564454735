"""What the tests of all programs do: interrupt them, and give them what they must refuse."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.core.engine import EvictionEngine


@contextlib.contextmanager
def interrupted_after(answers: int) -> Iterator[None]:
    """Ctrl-C comes when so many rows have been answered."""
    original, left = EvictionEngine.answer, answers

    def tired(self, *args, **kwargs):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvictionEngine, "answer", tired)
        yield


def assert_refused(code: int, error: str, culprit: str, out: Path) -> None:
    """The program said in one line what is wrong, and left no folder behind."""
    assert code == 2
    assert culprit in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.exists()
