"""The README's examples run as they stand, one after the other, on the model's first layers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

import models
from tests.models.layers_of import with_layers

README = Path(__file__).parents[1] / "README.md"
# Of 30: every program here is compiled, which takes a layer's time for each of them.
LAYERS = 2


def test_examples_run_and_mean_what_they_say(capsys, monkeypatch):
    load = models.load

    def load_first_layers(name):
        lm = load(name)
        assert lm.config.num_layers == 30
        return dataclasses.replace(lm, model=with_layers(lm.model, range(LAYERS)))

    monkeypatch.setattr(models, "load", load_first_layers)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks[:4]:
        exec(compile(block, str(README), "exec"), names)
    assert len(names["out"].rows()[0]) <= 16
    # 3 heads, 128 + 32 slots of 64, keys and values in float32
    assert names["out"].cache.kv_bytes == 2 * LAYERS * 3 * 160 * 64 * 4
    assert names["new_tokens"].shape == names["logprobs"].shape == (2, 8)
    assert [cache.slots(0) for cache in names["caches"][:2]] == [160, 256]
    assert names["columns"].shape == (1, 2, 128)
    np.testing.assert_array_equal(names["kept"].positions, names["columns"])
    assert np.isinf(names["importance"]).sum() == 2 * 32
    assert capsys.readouterr().out.count("\n") == 3
    exec(compile(blocks[4], str(README), "exec"), names)
    assert names["logprobs"].shape == names["answer"].shape
    assert names["out"].cache.slots(0) == 128 + 32
    assert len(names["out"].rows()[0]) == 200
    assert {names["cache"].slots(layer) for layer in range(LAYERS)} == {128 + 256}


def test_the_two_commands_come_first():
    lines = [line for line in README.read_text().splitlines() if line.startswith("pip install ")]
    assert "experiments.longbench" in lines[0]
    assert "pytest" in lines[1]
