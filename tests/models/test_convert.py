"""Orbax checkpoints: written by `models.convert`, read by `models.load`."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from model_fixtures import FIXTURES, checkpoints
from test_gguf_file import write

import models
from models import convert
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.hf_write import to_hf
from models.weights import named_parameters

FOLDERS = checkpoints("hf_tiny/*", wants="goldens.npz")


def assert_same_weights(one, other):
    one, other = named_parameters(one), named_parameters(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path], err_msg=path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Any of the fixtures and its converted copy."""
    folder = FOLDERS[0].values[0]
    target = tmp_path_factory.mktemp("converted") / "new" / "model"
    convert.convert(folder, target)
    return folder, target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fixtures_round_trip_is_bit_identical(converted, dtype):
    folder, target = converted
    before, after = (models.load(path, dtype=dtype) for path in (folder, target))
    assert_same_weights(before.model, after.model)
    assert after.config == before.config
    assert (after.eos_ids, after.turn_end_ids) == (before.eos_ids, before.turn_end_ids)
    text = "Some text, 123."
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)


@pytest.mark.parametrize("folder", checkpoints("hf_tiny/quirks/*"))
def test_fixtures_weights_are_stored_as_they_are(tmp_path, folder):
    convert.convert(folder, tmp_path / "out")
    before, after = open_checkpoint(folder).parameters, open_checkpoint(tmp_path / "out").parameters
    for path in before.shapes:
        wanted, got = before.read(path), after.read(path)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted, err_msg=path)
    for dtype in ("float32", "bfloat16"):
        same = models.load(folder, dtype=dtype).model
        assert_same_weights(models.load(tmp_path / "out", dtype=dtype).model, same)


def test_fixtures_converted_converts_again(converted, tmp_path):
    _, target = converted
    convert.convert(target, tmp_path / "again")
    assert_same_weights(models.load(tmp_path / "again").model, models.load(target).model)


def test_fixtures_bfloat16_is_stored_as_such(tmp_path):
    folder = FOLDERS[-1].values[0]
    convert.convert(folder, tmp_path / "half", dtype="bfloat16")
    stored = open_checkpoint(tmp_path / "half").parameters
    assert {stored.read(path).dtype for path in stored.shapes} == {jnp.dtype("bfloat16")}
    half = models.load(folder, dtype="bfloat16")
    assert_same_weights(models.load(tmp_path / "half", dtype="bfloat16").model, half.model)


def test_fixtures_restores_onto_a_mesh(converted):
    folder, target = converted
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(path, shape):
        if len(shape) == 1 or shape[1] % 4:
            return None
        return NamedSharding(mesh, PartitionSpec(None, "model"))

    whole = models.load(folder).model
    for spec in (folder, target):
        model = models.load(spec, sharding=sharding).model
        assert_same_weights(model, whole)
        for path, value in named_parameters(model).items():
            wanted = sharding(path, value.shape)
            assert wanted is None or value.sharding == wanted


def test_fixtures_sharding_that_does_not_fit(converted):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    odd = NamedSharding(mesh, PartitionSpec(None, None, "model"))
    for spec in converted:
        with pytest.raises(ValueError, match=r"sharding: embed\.w"):
            models.load(spec, sharding=lambda *_: odd)


def test_gguf_becomes_hub_files(tmp_path):
    write(tmp_path / "model.gguf")
    before = models.load(tmp_path / "model.gguf")
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    after = models.load(tmp_path / "out")
    assert_same_weights(before.model, after.model)
    assert after.config == before.config
    assert after.eos_ids == before.eos_ids
    assert after.tokenizer.encode("ab<|im_end|>a") == before.tokenizer.encode("ab<|im_end|>a")


@pytest.mark.parametrize("folder", FOLDERS)
def test_fixtures_config_is_written_as_it_was_read(folder):
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    written = json.loads(json.dumps(to_hf(config)))
    assert ModelConfig.from_hf(written) == config


def test_fixtures_command_line(converted, tmp_path, capsys):
    folder, _ = converted
    assert convert.main([str(folder), str(tmp_path / "out")]) == 0
    assert convert.main([str(folder), str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "absent"), str(tmp_path / "new")]) == 1
    assert "absent" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted[1], tmp_path / "copy")


def test_fixtures_other_config_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"intermediate_size": 7, "tie_word_embeddings": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.CheckpointError, match="the config asks for") as refusal:
        models.load(copy)
    assert "layers.0.mlp.gate.w has shape" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_fixtures_missing_metadata_is_refused(copy):
    (copy / "orbax/_METADATA").unlink()
    with pytest.raises(models.CheckpointError, match="orbax: not a whole") as refusal:
        models.load(copy)
    assert "\n" not in str(refusal.value)


def test_fixtures_missing_data_is_refused(copy, tmp_path):
    """In a process of its own: Orbax leaves other reads behind when one of them fails."""
    shutil.rmtree(copy / "orbax/d")
    command = [sys.executable, "-m", "models.convert", str(copy), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert f"error: {copy / 'orbax'}: " in done.stderr


def test_fixtures_missing_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(models.CheckpointError, match=r"config\.json: missing"):
        models.load(copy)


def test_stored_nan_is_refused(tmp_path):
    model = write(tmp_path / "model.gguf")
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/orbax")
    broken = {path: np.asarray(value) * np.nan for path, value in named_parameters(model).items()}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "out/orbax", broken)
    with pytest.raises(models.CheckpointError, match=r"embed\.w holds NaN"):
        models.load(tmp_path / "out")
    with pytest.raises(models.CheckpointError, match=r"embed\.w holds NaN"):
        convert.convert(tmp_path / "out", tmp_path / "again")


def test_fixtures_nan_leaves_nothing_behind(tmp_path):
    folder = FIXTURES / "hf_tiny/broken/nan_weights"
    with pytest.raises(models.CheckpointError, match=r"1\.self_attn\.q_proj\.weight holds NaN"):
        convert.convert(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
