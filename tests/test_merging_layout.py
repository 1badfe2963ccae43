import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.layout import Layout, block_of, natural
from ecotone.populations.errors import CheckpointError

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.weight",
    "model.layers.2.mlp.bias",
    "model.layers.2.mlp.weight",
    "model.layers.10.mlp.weight",
    "model.norm.weight",
    "score.weight",
]


def saved(path, names, **extra):
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    save_file(tensors | extra, path)
    return Layout.of(Checkpoint.open(path))


@given(st.permutations(NAMES))
def test_order_does_not_depend_on_the_order_of_names(order):
    assert sorted(order, key=natural) == NAMES


def test_layout_does_not_depend_on_sharding(tmp_path):
    whole = saved(tmp_path / "a.safetensors", NAMES)
    directory = tmp_path / "sharded"
    directory.mkdir()
    weight_map = {}
    for shard, names in enumerate([NAMES[4:], NAMES[1:4], NAMES[:1]], start=1):
        file = f"model-{shard:05d}-of-00003.safetensors"
        save_file({name: torch.zeros(2, 3) for name in names}, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cut = Layout.of(Checkpoint.open(directory))
    assert cut == whole
    assert cut.tensors == tuple(NAMES)
    np.testing.assert_array_equal(cut.tensor_borders, np.arange(8) * 6)


def test_blocks_are_runs_of_tensors_of_one_layer(tmp_path):
    layout = saved(tmp_path / "a.safetensors", NAMES)
    assert layout.blocks == (
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.2",
        "model.layers.10",
        "model.norm",
        "score",
    )
    np.testing.assert_array_equal(layout.block_borders, [0, 6, 12, 24, 30, 36, 42])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("0.weight", "0"),
        ("fc1.weight", "fc1"),
        ("cls_token", "cls_token"),
        ("lm_head.weight", "lm_head"),
        ("vit.embeddings.patch_embeddings.projection.bias", "vit.embeddings"),
        ("vit.encoder.layer.11.output.dense.bias", "vit.encoder.layer.11"),
    ],
)
def test_block_names(name, block):
    assert block_of(name) == block


def test_integers_bools_and_empty_tensors_are_buffers(tmp_path):
    layout = saved(
        tmp_path / "a.safetensors",
        ["w"],
        steps=torch.tensor(3),
        mask=torch.tensor([True]),
        empty=torch.zeros(0, 4),
        scale=torch.tensor(2.0),
    )
    assert layout.tensors == ("scale", "w")
    assert set(layout.buffers) == {"steps", "mask", "empty"}
    assert layout.size == 7
    assert layout.shapes == ((), (2, 3))


@pytest.mark.parametrize(
    ("stored", "kept", "aliases"),
    [
        (["lm_head.weight", "model.embed_tokens.weight"], {"model.embed_tokens.weight"}, {"lm_head.weight"}),
        (["lm_head.weight", "transformer.wte.weight"], {"transformer.wte.weight"}, {"lm_head.weight"}),
        (
            ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
            {"shared.weight"},
            {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
        ),
        (["model.embed_tokens.weight", "score.weight"], {"model.embed_tokens.weight", "score.weight"}, set()),
    ],
)
def test_tied_weights_appear_once(tmp_path, stored, kept, aliases):
    save_file({name: torch.zeros(2, 3) for name in stored}, tmp_path / "model.safetensors")
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        layout = Layout.of(Checkpoint.open(tmp_path))
        assert set(layout.tensors) == (kept if tied else set(stored))
        assert set(layout.aliases) == (aliases if tied else set())


def test_a_checkpoint_without_parameters_is_refused(tmp_path):
    save_file({"steps": torch.tensor(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="floating-point tensors to merge, found none"):
        Layout.of(Checkpoint.open(tmp_path / "a.safetensors"))
