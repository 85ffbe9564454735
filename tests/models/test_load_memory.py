"""How much host memory loading takes, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

VOCAB, LAYERS, WIDTH, MLP = 16384, 8, 1024, 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": 8,
    "intermediate_size": MLP,
}
# Anonymous memory only: pages of the mapped files can be dropped at any time.
PROBE = """
import sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec
import models

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

sharding = None
if sys.argv[3] == "sharded":
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("model"))
    sharding = lambda path, shape: split
models.load(sys.argv[2])
peak = before = anonymous()
threading.Thread(target=watch, daemon=True).start()
model = models.load(sys.argv[1], dtype="bfloat16", sharding=sharding).model
print(peak - before, models.weights.weights_bytes(model))
"""


def write(folder, config, layers):
    """A checkpoint in float32, one shard for each layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    weight_map = {}

    def shard(number, shapes):
        file = f"model-{number}.safetensors"
        tensors = {name: random.standard_normal(shape, np.float32) for name, shape in shapes}
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    width, mlp, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shard(
        0,
        [
            ("model.embed_tokens.weight", (vocab, width)),
            ("model.norm.weight", (width,)),
            ("lm_head.weight", (vocab, width)),
        ],
    )
    for layer in range(layers):
        at = f"model.layers.{layer}"
        attention = [(f"{at}.self_attn.{name}_proj.weight", (width, width)) for name in "qkvo"]
        shard(
            layer + 1,
            [
                *attention,
                (f"{at}.mlp.gate_proj.weight", (mlp, width)),
                (f"{at}.mlp.up_proj.weight", (mlp, width)),
                (f"{at}.mlp.down_proj.weight", (width, mlp)),
                (f"{at}.input_layernorm.weight", (width,)),
                (f"{at}.post_attention_layernorm.weight", (width,)),
            ],
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint to measure, and one of the same kind that warms everything up."""
    base = tmp_path_factory.mktemp("checkpoints")
    small = {"vocab_size": 16, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    return write(base / "large", CONFIG, LAYERS), write(base / "small", CONFIG | small, 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures through /proc")
@pytest.mark.parametrize("placement", ["one", "sharded"])
def test_the_host_holds_about_one_tensor_at_a_time(folders, placement):
    command = [sys.executable, "-c", PROBE, *map(str, folders), placement]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    peak, weights = map(int, done.stdout.split())
    largest = 4 * VOCAB * WIDTH  # as stored, in float32
    assert weights == 2 * LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH) + 2 * (
        2 * VOCAB * WIDTH + WIDTH
    )
    # The devices are in host memory here, so the weights count as well; and the tensor is there
    # as stored and as cast, beside what the allocator keeps.
    assert peak < weights + 3 * largest
