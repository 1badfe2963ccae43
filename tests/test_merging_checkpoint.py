import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model

from ecotone.merging.models import preflight
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": torch.randn(4, 3, generator=generator).to(dtype),
        "layers.0.bias": torch.randn(4, generator=generator).to(dtype),
        "steps": torch.tensor(7),
    }


def sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_what_was_saved(tmp_path, dtype):
    tensors = tiny(dtype=dtype) | {"flags": torch.tensor([True, False]), "scale": torch.tensor(0.5, dtype=dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    for checkpoint in (Checkpoint.open(tmp_path / "a.safetensors"), Checkpoint.open(sharded(tmp_path / "s", tensors))):
        assert set(checkpoint.tensors) == set(tensors)
        for name, expected in tensors.items():
            found = checkpoint.tensor(name)
            assert found.dtype == expected.dtype == checkpoint.tensors[name].dtype
            assert found.shape == expected.shape == checkpoint.tensors[name].shape
            assert torch.equal(found, expected)


def test_names_come_from_the_file_or_its_directory(tmp_path):
    (tmp_path / "math").mkdir()
    save_file(tiny(), tmp_path / "math" / "model.safetensors")
    save_file(tiny(), tmp_path / "code.safetensors")
    assert Checkpoint.open(tmp_path / "math").name == "math"
    assert Checkpoint.open(tmp_path / "math" / "model.safetensors").name == "math"
    assert Checkpoint.open(tmp_path / "code.safetensors").name == "code"
    assert Checkpoint.open(tmp_path / "code.safetensors", "expert").name == "expert"


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    save_file(tiny(), tmp_path / "a.safetensors")
    Checkpoint.open(tmp_path / "a.safetensors").tensor("layers.0.bias").zero_()
    assert torch.equal(Checkpoint.open(tmp_path / "a.safetensors").tensor("layers.0.bias"), tiny()["layers.0.bias"])


def test_unaligned_tensors_of_other_writers_are_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2 + 2)
    data = torch.tensor([1.5, -2.0])
    path = tmp_path / "odd.safetensors"
    for padding in (b"", b" ", b"  ", b"   "):
        text = header + padding
        path.write_bytes(len(text).to_bytes(8, "little") + text + data.numpy().tobytes())
        assert torch.equal(Checkpoint.open(path).tensor("x"), data)


def test_missing_file_suggests_the_nearest_name(tmp_path):
    save_file(tiny(), tmp_path / "expert-math.safetensors")
    with pytest.raises(CheckpointError, match=r"no such file.*Did you mean '.*expert-math\.safetensors'"):
        Checkpoint.open(tmp_path / "expert-mth.safetensors")


def test_gguf_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "tiny.Q4.gguf").write_bytes(b"GGUF" + bytes(20))
    for path in (tmp_path / "tiny.Q4.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="GGUF, which holds quantised weights") as caught:
            Checkpoint.open(path)
        code = caught.value.remedy.partition("python -c ")[2].strip('"')
        compile(code, "remedy", "exec")
        assert f"from_pretrained('{tmp_path}', gguf_file='tiny.Q4.gguf')" in code
        assert f"save_pretrained('{tmp_path / 'tiny.Q4'}') for k in (M, T)" in code


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    torch.save(tiny(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"found a pickle.*weights_only=True.*\.safetensors"):
        Checkpoint.open(tmp_path / name)


def test_a_directory_of_pickles_is_refused_without_loading_one(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os._exit, (1,))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"found a pickle \(pytorch_model\.bin\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    save_file(tiny(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: expected a complete safetensors file"):
        Checkpoint.open(path)


def test_truncated_shard_is_named(tmp_path):
    directory = sharded(tmp_path / "model", tiny())
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b"\xff\xfe{}",
    ],
)
def test_corrupt_header_is_refused(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        Checkpoint.open(path)


def test_missing_shard_is_named(tmp_path):
    directory = sharded(tmp_path / "model", tiny())
    (directory / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard 'model-00001-of-00002\.safetensors'.*missing"):
        Checkpoint.open(directory)


def test_shard_without_the_tensor_the_index_promises(tmp_path):
    directory = sharded(tmp_path / "model", tiny())
    save_file({"other": torch.zeros(1)}, directory / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"no 'layers\.0\.bias' in its shards .the first of 2 such tensors"):
        Checkpoint.open(directory)


def test_index_cannot_point_outside_its_directory(tmp_path):
    directory = sharded(tmp_path / "model", tiny())
    index = {"weight_map": {"steps": "../a.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="beside the index"):
        Checkpoint.open(directory)


def test_ambiguous_empty_and_adapter_directories(tmp_path):
    with pytest.raises(CheckpointError, match="found none"):
        Checkpoint.open(tmp_path)
    for name in ("a", "b"):
        save_file(tiny(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"exactly one .* found 2"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*merge_and_unload"):
        Checkpoint.open(tmp_path)


def test_preflight_names_the_first_difference_and_both_files(tmp_path):
    def opened(name, tensors):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return Checkpoint.open(tmp_path / f"{name}.safetensors")

    same = [opened("a", tiny(0)), opened("b", tiny(1))]
    assert preflight.check(same).size == 16
    mixed = preflight.check([opened("half", tiny(0, torch.bfloat16)), *same])
    assert mixed.size == 16
    assert set(mixed.dtypes) == {torch.bfloat16}

    cases = {
        "missing": (
            {k: v for k, v in tiny().items() if k != "layers.0.bias"},
            r"'layers\.0\.bias' is in 'a'.*not in 'missing'",
        ),
        "extra": (tiny() | {"head.bias": torch.zeros(2)}, r"'head\.bias' is in 'extra'.*not in 'a'"),
        "shape": (tiny() | {"layers.0.weight": torch.zeros(4, 5)}, r"shape \(4, 3\) in 'a'.*\(4, 5\) in 'shape'"),
        "dtype": (
            tiny(dtype=torch.float64),
            r"'layers\.0\.bias' is torch\.float32 in 'a'.*torch\.float64 in 'dtype'",
        ),
        "buffer": (tiny() | {"steps": torch.tensor([1, 2])}, r"'steps' has shape"),
    }
    for name, (tensors, message) in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            preflight.check([*same, opened(name, tensors)])
        assert f"{name}.safetensors" in str(caught.value)
        assert "a.safetensors" in str(caught.value)


def test_preflight_reads_no_weight(tmp_path, monkeypatch):
    for name in "ab":
        save_file(tiny(), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))
    Sources.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_sources_refuse_what_does_not_fit(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tiny(), path)
    with pytest.raises(InputError, match="at least one model"):
        Sources.open([])
    with pytest.raises(InputError, match="Did you mean 'linear'"):
        Sources.open([path], operator="linaer")
    with pytest.raises(InputError, match="needs the model the experts were fine-tuned from"):
        Sources.open([path], operator="task_arithmetic")
    with pytest.raises(InputError, match="2 distinct names"):
        Sources.open([path, path], names=["x", "x"])
    assert Sources.open([path, path, path]).names == ("a", "a-2", "a-3")
    assert Sources.open([path, path], names=["x", "y"]).names == ("x", "y")


def test_broken_config_is_named(tmp_path):
    save_file(tiny(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_weights_that_save_model_dropped_are_aliases(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = torch.nn.Linear(2, 2)
            self.b.weight = self.a.weight

    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    layout = Sources.open([tmp_path / "tied.safetensors"]).layout
    assert set(layout.tensors) | set(layout.aliases) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert len(layout.aliases) == 1
    assert layout.size == 8
