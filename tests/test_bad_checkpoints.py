"""Checkpoints that cannot be merged as they are, or only just: what is told, and what is taken after all."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_language_checkpoints import llama

from ecotone import Recipe, launch
from ecotone.experiments import checks
from ecotone.experiments.checks import _architecture, _models, validate
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_file
from ecotone.merging.models import architectures
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.placement import apart
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, EcotoneError, InputError
from ecotone.populations.genome import Genome

INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


def plain(path, seed=0, **more):
    torch.manual_seed(seed)
    save_file({"fc.weight": torch.randn(3, 4), "fc.bias": torch.randn(3), **more}, path)
    return path


def sharded(folder, seed=0):
    return llama(folder, seed, tied=False, shard="6KB")


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def configured(folder, **fields):
    """Change fields of a configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def findings(sources):
    return {one.subject: one.text for check in (_models, _architecture) for one in check(sources)}


class TestTypes:
    @pytest.mark.parametrize(
        "buffer",
        [
            torch.polar(torch.ones(3), torch.arange(3.0)),
            *(torch.arange(3).to(getattr(torch, f"uint{n}")) for n in (16, 32, 64)),
        ],
        ids=lambda buffer: str(buffer.dtype),
    )
    def test_complex_and_unsigned_buffers_are_copied(self, tmp_path, buffer):
        paths = [plain(tmp_path / f"{name}.safetensors", seed, codes=buffer) for seed, name in enumerate("ab")]
        sources = Sources.open(paths)
        genome = Genome.uniform(sources.layout.size, [0.5, 0.5])
        (shown,) = Resident(sources, None, CPU).show([genome])
        exported = load_file(export_file(sources, genome, tmp_path / "merged.safetensors", {}))
        for tensors in (shown, exported):
            assert tensors["codes"].dtype == buffer.dtype
            assert torch.equal(tensors["codes"].view(torch.uint8), buffer.view(torch.uint8))
        assert set(sources.layout.buffers) == {"codes"}
        told = {one.subject: one.text for one in _models(sources)}.get("complex tensors")
        assert told == ("not merged but copied from a: codes" if buffer.is_complex() else None)

    def test_a_type_that_torch_has_not_is_named(self, tmp_path):
        header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
        (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
        with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'x' has the type F4, .*quantised weights"):
            Checkpoint.open(tmp_path / "a.safetensors")


QUANTISED = {
    "bnb 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits", r"m\.dequantize\(\)"),
    "bnb 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes \(8 bits", r"m\.dequantize\(\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"GPTQ \(4 bits", "pip install gptqmodel"),
    "awq": ({"quant_method": "awq", "bits": 4}, r"AWQ \(4 bits", "pip install gptqmodel"),
    "fp8": ({"quant_method": "fp8"}, "FP8", r"FineGrainedFP8Config\(dequantize=True\)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "MXFP4", r"Mxfp4Config\(dequantize=True\)"),
    "ct": ({"quant_method": "compressed-tensors"}, "compressed-tensors", r"CompressedTensorsConfig\(dequantize=True\)"),
    "torchao": ({"quant_method": "torchao"}, "torchao", "Give the checkpoint that it was made from"),
    "none": ({"bits": 3}, r"a kind that it does not name \(3 bits", "Give the checkpoint that it was made from"),
}
CODES = torch.zeros(4, 4, dtype=torch.uint8)
BY_NAMES = {
    "GPTQ": {"fc.qweight": CODES.int(), "fc.qzeros": CODES.int(), "fc.g_idx": torch.zeros(4, dtype=torch.int32)},
    "AWQ": {"fc.qweight": CODES.int(), "fc.qzeros": CODES.int(), "fc.scales": torch.ones(4)},
    "bitsandbytes": {"fc.weight.absmax": torch.ones(4), "fc.weight.quant_map": torch.ones(16), "fc.weight": CODES},
    "FP8": {"fc.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "fc.weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": {"fc.weight_packed": CODES.int(), "fc.weight_scale": torch.ones(4, 1)},
    "MXFP4": {"experts.down_proj_blocks": CODES, "experts.down_proj_scales": CODES + 1},
    "integers and scales": {
        "fc.weight": CODES.to(torch.uint32),
        "fc.scales": torch.ones(4, 1),
        "fc.biases": torch.ones(4, 1),
    },
}


class TestQuantisedWeights:
    @pytest.mark.parametrize("kind", QUANTISED)
    @pytest.mark.parametrize("place", ["quantization_config", "text_config.quantization_config", "compression_config"])
    def test_the_configuration_says_which_kind_and_how_to_undo_it(self, tmp_path, kind, place):
        config, title, remedy = QUANTISED[kind]
        config = {place.split(".")[-1]: config}
        config = {"text_config": config} if "." in place else config
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
        save_file({"norm.weight": torch.ones(4), "fc.weight": CODES}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"quantised ones: {title}.*{place} of config\.json") as caught:
            Sources.open([tmp_path])
        assert re.search(remedy, caught.value.remedy)

    @pytest.mark.parametrize("kind", BY_NAMES)
    def test_or_the_names_of_tensors(self, tmp_path, kind):
        save_file({"norm.weight": torch.ones(4), **BY_NAMES[kind]}, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=rf"quantised ones: {kind} \(tensor '"):
            Sources.open([tmp_path / "a.safetensors"])

    def test_a_field_that_was_left_behind(self, tmp_path):
        folder = configured(llama(tmp_path, 0, tied=False), quantization_config={"quant_method": "fp8"})
        with pytest.raises(CheckpointError, match=r"remove the field from config\.json"):
            Sources.open([folder])

    def test_integers_that_are_no_weights_are_not(self, tmp_path):
        more = {"fc.zero_point": torch.zeros(4, dtype=torch.uint8), "fc.scale": torch.ones(4), "ids.weight": CODES}
        assert Sources.open([plain(tmp_path / "a.safetensors", **more)])


class TestEmptyWeights:
    def test_a_model_that_zero_3_did_not_gather(self, tmp_path):
        for seed, name in enumerate("ab"):
            llama(tmp_path / name, seed, tied=False)
        file = tmp_path / "b" / "model.safetensors"
        empty = {name: torch.empty(0) if ".mlp." in name else tensor for name, tensor in load_file(file).items()}
        save_file(empty, file, {"format": "pt"})
        for experts in (["a", "b"], ["b", "a"], ["b", "b"]):
            with pytest.raises(
                CheckpointError, match=r"b: tensor '.*mlp.*' is empty \(the first of 6.*ZeRO-3"
            ) as caught:
                Sources.open([tmp_path / name for name in experts])
            assert "stage3_gather_16bit_weights_on_model_save" in caught.value.remedy
            assert "zero_to_fp32.py" in caught.value.remedy

    def test_a_state_dict_of_which_others_are_not_empty(self, tmp_path):
        full = plain(tmp_path / "a.safetensors", more=torch.ones(2))
        bare = plain(tmp_path / "b.safetensors", more=torch.empty(0))
        with pytest.raises(CheckpointError, match=r"b\.safetensors\): tensor 'more' is empty.*ZeRO-3"):
            Sources.open([full, bare])
        assert Sources.open([bare, bare])


class TestShards:
    def test_an_index_without_metadata_is_told_with_the_command_that_adds_it(self, tmp_path):
        folder = sharded(tmp_path / "model")
        (folder / INDEX).write_text(json.dumps({"weight_map": index_of(folder)["weight_map"]}))
        sources = Sources.open([folder])
        for make in (lambda: list(_architecture(sources)), lambda: Resident(sources, "auto", CPU)):
            with pytest.raises(CheckpointError, match=r"metadata: expected an object.*found none") as caught:
                make()
        code = re.search(r'python -c "(.*)"$', caught.value.remedy)[1]
        exec(code)
        assert findings(sources)
        assert Resident(sources, "auto", CPU)

    @pytest.mark.parametrize("metadata", [None, [], "none"])
    def test_odd_metadata(self, tmp_path, metadata):
        folder = sharded(tmp_path / "model")
        (folder / INDEX).write_text(json.dumps(index_of(folder) | {"metadata": metadata}))
        with pytest.raises(CheckpointError, match="metadata: expected an object"):
            architectures.outline(Checkpoint.open(folder))

    @pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "not JSON"])
    def test_no_map_of_weights(self, tmp_path, text):
        folder = sharded(tmp_path / "model")
        (folder / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: expected a JSON object whose weight_map"):
            Checkpoint.open(folder)

    def test_shards_in_a_folder(self, tmp_path):
        folder = sharded(tmp_path / "model")
        expected = {name: Checkpoint.open(folder).tensor(name).clone() for name in Checkpoint.open(folder).tensors}
        (folder / "weights").mkdir()
        for file in folder.glob("*.safetensors"):
            file.rename(folder / "weights" / file.name)
        found = index_of(folder)
        found["weight_map"] = {name: f"weights/{file}" for name, file in found["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(found))
        sources = Sources.open([folder])
        assert all(torch.equal(sources.origin.tensor(name), tensor) for name, tensor in expected.items())
        assert Resident(sources, "auto", CPU)

    def test_a_tensor_that_lies_in_another_shard_than_the_index_says(self, tmp_path):
        folder = sharded(tmp_path / "model")
        found = index_of(folder)
        name, *_, last = sorted(found["weight_map"], key=found["weight_map"].get)
        found["weight_map"][name] = found["weight_map"][last]
        (folder / INDEX).write_text(json.dumps(found))
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
        assert torch.equal(Checkpoint.open(folder).tensor(name), loaded[name])

    def test_renamed_shards_are_found_by_their_tensors(self, tmp_path):
        folder = sharded(tmp_path / "model")
        first, *_ = sorted(folder.glob("model-*.safetensors"))
        first.rename(folder / "part1.safetensors")
        with pytest.raises(
            CheckpointError, match=f"'{first.name}'.*missing, and 'part1.safetensors' beside it"
        ) as caught:
            Checkpoint.open(folder)
        assert caught.value.remedy.startswith(f"Rename part1.safetensors to {first.name}")

    def test_several_missing_shards_are_counted(self, tmp_path):
        folder = sharded(tmp_path / "model")
        files = sorted(folder.glob("model-*.safetensors"))
        for file in files[:2]:
            file.unlink()
        with pytest.raises(CheckpointError, match=r"missing \(the first of 2 such shards\)\. Download"):
            Checkpoint.open(folder)

    def test_files_that_are_not_read_are_told(self, tmp_path):
        folder = sharded(tmp_path / "model")
        assert "files of model" not in findings(Sources.open([folder]))
        save_file({"x": torch.ones(1)}, folder / "model-00001-of-00099.safetensors")
        text = findings(Sources.open([folder]))["files of model"]
        assert text == f"Warning: {INDEX} is read; not read: model-00001-of-00099.safetensors"
        (llama(tmp_path / "whole", 1, tied=False) / "model.safetensors").rename(folder / "model.safetensors")
        text = findings(Sources.open([folder]))["files of model"]
        assert text.startswith("Warning: model.safetensors is read; not read: model-00001-of-")

    def test_a_link_that_leads_nowhere(self, tmp_path):
        folder = llama(tmp_path / "model", 0, tied=False)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to("../blobs/abc")
        with pytest.raises(CheckpointError, match=r"found a link that leads nowhere \(\.\./blobs/abc\)"):
            Checkpoint.open(folder)


class TestFoldersOfTheHubsCache:
    def cached(self, folder, commits=("abc",), main=None):
        place = folder / "models--org--name"
        for seed, commit in enumerate(commits):
            llama(place / "snapshots" / commit, seed, tied=False)
        if main:
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text(main)
        return place

    @pytest.mark.parametrize(("commits", "main", "expected"), [(["abc"], None, "abc"), (["abc", "def"], "def", "def")])
    def test_one_stands_for_its_snapshot(self, tmp_path, commits, main, expected):
        place = self.cached(tmp_path, commits, main)
        for opened in (Checkpoint.open(place), Sources.open([place], place).origin):
            assert opened.path == place / "snapshots" / expected
            assert opened.name == "name"

    def test_of_several_one_is_to_be_chosen(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"expected one snapshot.*abc, .*def") as caught:
            Checkpoint.open(self.cached(tmp_path, ["abc", "def"]))
        assert "org/name" in caught.value.remedy

    def test_an_adapter_in_one_is_an_adapter(self, tmp_path):
        snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "adapter_config.json").write_text("{}")
        with pytest.raises(InputError, match="is a LoRA adapter and needs the model it was trained on"):
            Sources.open([tmp_path / "models--org--name"])


class TestConfigurations:
    def test_more_layers_than_are_stored(self, tmp_path):
        folder = configured(llama(tmp_path, 0, tied=False), num_hidden_layers=3)
        expected = r"config\.json: num_hidden_layers: expected 2, as .* model\.layers\.0 to model\.layers\.1, found 3"
        with pytest.raises(InputError, match=expected):
            list(_architecture(Sources.open([folder])))

    def test_fewer_layers_than_are_stored(self, tmp_path):
        sources = Sources.open([configured(llama(tmp_path, 0, tied=False), num_hidden_layers=1)])
        assert findings(sources)["layers"].startswith("Warning: config.json: num_hidden_layers: expected 2, ")

    def test_layers_that_predict_more_tokens_are_no_lie(self, tmp_path):
        folder = configured(llama(tmp_path, 0, tied=False), num_hidden_layers=1, num_nextn_predict_layers=1)
        assert "layers" not in findings(Sources.open([folder]))

    def test_an_expert_of_another_family(self, tmp_path):
        first = llama(tmp_path / "a", 0, tied=False)
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "b")
        with pytest.raises(CheckpointError, match=r"other families: model_type is 'llama' in 'a' .* and 'gpt2' in 'b'"):
            Sources.open([first, tmp_path / "b"])

    def test_an_expert_of_another_depth(self, tmp_path):
        paths = [llama(tmp_path / name, 0, tied=False) for name in "ab"]
        config = transformers.LlamaConfig.from_pretrained(paths[1], num_hidden_layers=3)
        transformers.LlamaForCausalLM(config).save_pretrained(paths[1])
        with pytest.raises(CheckpointError, match=r"num_hidden_layers: 2 in 'a', 3 in 'b'"):
            Sources.open(paths)

    @pytest.mark.parametrize("code", [False, True])
    def test_a_family_that_transformers_has_not(self, tmp_path, code):
        own = {"auto_map": {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}} if code else {}
        folder = configured(llama(tmp_path, 0, tied=False), architectures=["NewForCausalLM"], model_type="new", **own)
        (folder / "modeling_new.py").write_text("raise SystemExit('run')\n")
        with pytest.raises(InputError, match=r"has no 'NewForCausalLM' \(model_type 'new'\)") as caught:
            list(_architecture(Sources.open([folder])))
        assert ("Its own code (auto_map) is never run." in caught.value.message) == code
        assert "architecture: {call: package.module:function}" in caught.value.remedy

    def test_names_that_older_versions_wrote_beside_the_text_model(self, tmp_path):
        folder = llama(tmp_path, 0, tied=False)
        configured(folder, architectures=None, text_config={"architectures": ["LlamaForCausalLM"]})
        assert architectures.named(Checkpoint.open(folder)) == "LlamaForCausalLM"

    def test_a_transformers_that_is_too_old(self, tmp_path, monkeypatch):
        sources = Sources.open([llama(tmp_path, 0, tied=False)])
        monkeypatch.setattr("transformers.__version__", "4.57.3")
        for make in (lambda: list(_architecture(sources)), lambda: Resident(sources, "auto", CPU)):
            with pytest.raises(InputError, match=r"needs transformers 5 or newer, found 4\.57\.3.*pip install"):
                make()

    def test_what_transformers_cannot_load_is_told(self, tmp_path, monkeypatch):
        sources = Sources.open([llama(tmp_path, 0, tied=False)])

        def refuse(*args, **kwargs):
            raise KeyError("metadata")

        monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
        with pytest.raises(EcotoneError, match=r"LlamaForCausalLM of transformers cannot load .*KeyError: 'metadata'"):
            Resident(sources, "auto", CPU)


@pytest.mark.parametrize(
    ("needed", "found", "texts"),
    [
        (344, 10, ("344 bytes", "10 bytes")),
        (1_540_000_000, 1_510_000_000, ("1.54 GB", "1.51 GB")),
        (2_000_000_001, 2_000_000_000, ("2.000000001 GB", "2.000000000 GB")),
    ],
)
def test_amounts_that_differ_are_told_apart(needed, found, texts):
    assert apart(needed, found) == texts


class TestValues:
    @pytest.fixture
    def recipe(self, tmp_path):
        """A merge of two models, the second one with a NaN that no score shows."""
        plain(tmp_path / "a.safetensors")
        plain(tmp_path / "b.safetensors", 1, unread=torch.tensor([1.0, torch.nan]))
        plain(tmp_path / "a.safetensors", 0, unread=torch.ones(2))
        (tmp_path / "scores.py").write_text("def size(model):\n    return float(model['fc.bias'].sum())\n")
        record = {
            "name": "nan",
            "models": {"experts": ["a.safetensors", "b.safetensors"]},
            "objectives": {"search": [{"name": "size", "type": "call", "call": f"{tmp_path}/scores.py:size"}]},
            "search": {"algorithm": "random"},
            "budget": {"evaluations": 2},
            "runtime": {"pool": "serial"},
            "tracking": {"mlflow": False},
        }
        return Recipe.from_record(record, tmp_path)

    def test_validate_and_run_refuse_nan(self, recipe, tmp_path):
        for refuses in (validate, lambda one: launch(one, tmp_path / "run")):
            with pytest.raises(InputError, match=r"models: expected numbers as weights, found NaN in b\."):
                refuses(recipe)

    def test_frozen_tensors_are_read_too(self, recipe, tmp_path):
        plain(tmp_path / "a.safetensors", 0, unread=torch.tensor([1.0, torch.nan]))
        plain(tmp_path / "b.safetensors", 1, unread=torch.ones(2))
        frozen = recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"freeze": ("unread",)})})
        for refuses in (validate, lambda one: launch(one, tmp_path / "run")):
            with pytest.raises(InputError, match=r"models: expected numbers as weights, found NaN in a\."):
                refuses(frozen)

    def test_what_takes_long_to_read_is_left_to_the_run(self, recipe, monkeypatch):
        monkeypatch.setattr(checks, "READ_BYTES", 10)
        found = {one.subject: one.text for one in validate(recipe)}
        assert re.fullmatch(r"\d+ bytes are not read here: `run` reads them once, and refuses NaN", found["values"])
