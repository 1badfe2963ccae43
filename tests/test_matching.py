"""Models whose files name, or hold, other tensors: they merge as models that are alike do."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, RANDOM, run_through, saved
from safetensors.torch import load_file, save_file
from test_names import renamed
from torch import nn

from ecotone.experiments.checks import _architecture, _models
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.matching import Treatment
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome
from ecotone.settings import Call

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 9).reshape(1, -1)


def rewritten(path: Path, change) -> None:
    """Change the tensors of a model's file."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configured(path: Path, **fields) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def families(name: str, folder: Path, **fields) -> list[Path]:
    """A base and two experts, their configuration with other fields."""
    folder.mkdir(exist_ok=True)
    family = FAMILIES[name]
    return saved(replace(family, arguments={**family.arguments, **fields}), folder)[1]


def gammas(tensors):
    """Names of layer norms as BERT was first saved with."""
    return renamed(r"LayerNorm\.bias$", "LayerNorm.beta")(renamed(r"LayerNorm\.weight$", "LayerNorm.gamma")(tensors))


def merge_of(sources: Sources) -> Genome:
    size = sources.layout.size
    return Genome([0, size // 3, size], [[0.3, 0.6], [0.9, -0.2]])


def weights(sources: Sources) -> dict[str, torch.Tensor]:
    """A merge by tensor name."""
    out = {name: torch.empty(info.shape) for name, info in sources.layout.parameters.items()}
    sources.materialise([merge_of(sources)], [out])
    return out


def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def scored(sources: Sources) -> torch.Tensor:
    (model,) = Resident(sources, "auto", CPU, stack_bytes=0).show([merge_of(sources)])
    return logits(model)


def exported(sources: Sources, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return export_directory(sources, merge_of(sources), folder / "export", "", {})


def loaded(path: Path) -> nn.Module:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not told["missing_keys"]
    return model.eval().requires_grad_(False)


class TestTies:
    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        """A base and two experts that are tied; the last one's copy is untied, and has its own output."""
        paths = families("llama", tmp_path, tie_word_embeddings=True)
        generator = torch.Generator().manual_seed(3)
        for path in paths:
            assert "lm_head.weight" not in load_file(path / "model.safetensors")

        def own_output(tensors):
            embedding = tensors["model.embed_tokens.weight"]
            return tensors | {"lm_head.weight": embedding + 0.1 * torch.randn(embedding.shape, generator=generator)}

        rewritten(paths[2], own_output)
        configured(paths[2], tie_word_embeddings=False)
        return paths

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
    def test_tied_and_untied_models_merge_untied(self, models, order, tmp_path):
        sources = Sources.open([models[i] for i in order[1:]], models[order[0]], "task_arithmetic")
        assert "lm_head.weight" in sources.layout.parameters
        assert not sources.layout.aliases
        found = weights(sources)
        tensors = [load_file(models[i] / "model.safetensors") for i in order]
        outputs = [one.get("lm_head.weight", one["model.embed_tokens.weight"]).double() for one in tensors]
        first = merge_of(sources).coefficients[0]  # the output comes first in flat order
        wanted = outputs[0] + sum(c * (one - outputs[0]) for c, one in zip(first, outputs[1:], strict=True))
        np.testing.assert_allclose(found["lm_head.weight"], wanted, atol=1e-6)

        path = exported(sources, tmp_path)
        assert not json.loads((path / "config.json").read_text())["tie_word_embeddings"]
        assert torch.equal(logits(loaded(path)), scored(sources))
        told = [finding.text for finding in _models(sources) if finding.subject == "names"]
        assert len(told) == 2
        assert all("tied tensors stored one by one" in text for text in told)

    def test_another_output_beside_a_tied_configuration_is_a_tensor_of_its_own(self, models, tmp_path):
        configured(models[2], tie_word_embeddings=True)
        for path in models[:2]:
            rewritten(path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        sources = Sources.open([models[0], models[2]])
        assert "lm_head.weight" in sources.layout.parameters
        own = Resident(sources, "auto", CPU, stack_bytes=0).expert(sources.names[1])
        assert torch.equal(logits(own), logits(loaded(models[2])))
        path = exported(sources, tmp_path)
        assert torch.equal(logits(loaded(path)), scored(sources))
        assert not json.loads((path / "config.json").read_text())["tie_word_embeddings"]

    def test_equal_bytes_beside_a_tied_configuration_are_tied(self, models):
        rewritten(models[1], lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        for order in ([0, 1], [1, 0]):
            sources = Sources.open([models[i] for i in order])
            assert "lm_head.weight" not in sources.layout.parameters
            assert torch.equal(scored(sources), scored(Sources.open([models[i] for i in order])))

    def test_encoders_with_decoders_are_refused(self, tmp_path):
        base, tied, untied = families("t5", tmp_path)
        rewritten(untied, lambda tensors: tensors | {"lm_head.weight": tensors["shared.weight"] * 2})
        configured(untied, tie_word_embeddings=False)
        with pytest.raises(
            CheckpointError, match=r"expected lm_head\.weight as a tensor of its own.*otherwise"
        ) as caught:
            Sources.open([tied, untied], base, "task_arithmetic")
        assert "all tied, or all untied" in str(caught.value)


class TestNames:
    @pytest.mark.parametrize(
        ("family", "change"),
        [
            ("gpt2", renamed(r"^transformer\.", "")),
            ("bert", renamed(r"^bert\.", "bert.")),
            ("bert", gammas),
            ("qwen2_5_vl", renamed(r"^model\.(?!visual)", "model.language_model.")),
        ],
        ids=["no prefix", "same", "gamma and beta", "language model"],
    )
    def test_names_that_are_loaded_alike_merge(self, family, change, tmp_path):
        alike, other = families(family, tmp_path / "alike"), families(family, tmp_path / "other")
        rewritten(other[2], change)
        wanted = weights(Sources.open(alike[1:], alike[0], "task_arithmetic"))
        sources = Sources.open(other[1:], other[0], "task_arithmetic")
        found = weights(sources)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        export = exported(sources, tmp_path)
        assert load_file(export / "model.safetensors").keys() == load_file(alike[0] / "model.safetensors").keys()

    @pytest.mark.parametrize("longer", [0, 1])
    @pytest.mark.parametrize("prefix", ["model.", "a.b."])
    def test_plain_files_may_have_a_prefix(self, longer, prefix, tmp_path):
        files = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
        for seed, file in enumerate(files):
            torch.manual_seed(seed)
            save_file(network().state_dict(), file)
        wanted = weights(Sources.open(files))
        save_file({prefix + name: tensor for name, tensor in load_file(files[longer]).items()}, files[longer])
        found = weights(Sources.open(files))
        assert found.keys() == {("" if longer else prefix) + name for name in wanted}
        assert all(torch.equal(one, other) for one, other in zip(found.values(), wanted.values(), strict=True))

    def test_names_that_only_begin_alike_do_not_fit(self, tmp_path):
        save_file({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, tmp_path / "one.safetensors")
        save_file({"m.a.weight": torch.ones(2), "n.b.weight": torch.ones(2)}, tmp_path / "two.safetensors")
        with pytest.raises(CheckpointError, match="The models differ"):
            Sources.open([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])

    def test_models_of_other_families_do_not_fit(self, tmp_path):
        llama, bert = families("llama", tmp_path / "llama"), families("bert", tmp_path / "bert")
        with pytest.raises(CheckpointError, match="The models differ"):
            Sources.open([llama[0], bert[0]])


EXTRA = "mtp.fc.weight"


class TestTensorsThatAreNotLoaded:
    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        """A base and two experts; all have a tensor that Llama does not take."""
        paths = families("llama", tmp_path)
        for number, path in enumerate(paths):
            rewritten(path, lambda tensors, at=number: tensors | {EXTRA: torch.full((2, 3), float(at))})
        return paths

    def opened(self, models, **treatment) -> Sources:
        made = Treatment(known=True, **treatment)
        return Sources.open(models[1:], models[0], "task_arithmetic", treatment=made)

    def test_they_are_merged_where_all_models_have_them(self, models, tmp_path):
        sources = self.opened(models)
        share = merge_of(sources).coefficients[1]
        written = load_file(exported(sources, tmp_path) / "model.safetensors")[EXTRA]
        torch.testing.assert_close(written, torch.full((2, 3), float(share[0] * 1 + share[1] * 2)))

    @pytest.mark.parametrize(("lacking", "value"), [((1,), 0.0), ((2,), 0.0), ((0,), 1.0), ((0, 1), 2.0)], ids=str)
    def test_where_one_lacks_them_they_are_the_bases_or_the_first_experts(self, models, lacking, value, tmp_path):
        for number in lacking:
            rewritten(models[number], lambda tensors: {k: v for k, v in tensors.items() if k != EXTRA})
        sources = self.opened(models)
        plain = self.opened(models)
        assert torch.equal(scored(sources), scored(plain))
        assert EXTRA not in sources.layout.parameters
        export = exported(sources, tmp_path)
        assert torch.equal(load_file(export / "model.safetensors")[EXTRA], torch.full((2, 3), value))
        assert torch.equal(logits(loaded(export)), scored(sources))
        (told,) = [finding.text for finding in _architecture(sources) if finding.subject == "not loaded"]
        assert told.startswith(f"1 tensor ({EXTRA}) that the architecture does not load: not merged, but exported as")

    def test_they_may_be_taken_from_the_base_or_dropped(self, models, tmp_path):
        sources = self.opened(models, unused="base")
        assert float(load_file(exported(sources, tmp_path / "base") / "model.safetensors")[EXTRA][0, 0]) == 0
        sources = self.opened(models, unused="drop")
        assert EXTRA not in load_file(exported(sources, tmp_path / "drop") / "model.safetensors")
        (told,) = [finding.text for finding in _architecture(sources) if finding.subject == "not loaded"]
        assert (
            told == f"1 tensor ({EXTRA}) that the architecture does not load: left out of exports (models.unused: drop)"
        )

    def test_it_must_be_known_what_is_loaded(self, models):
        with pytest.raises(InputError, match=r"models\.unused: expected architecture: auto with 'drop'"):
            Sources.open(models[1:], models[0], "task_arithmetic", treatment=Treatment("drop"))

    def test_tensors_that_are_loaded_may_not_lack(self, models):
        rewritten(models[1], lambda tensors: {k: v for k, v in tensors.items() if k != "model.norm.weight"})
        with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in"):
            self.opened(models)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


class TestFreezing:
    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        return families("qwen3_moe", tmp_path)

    @pytest.mark.parametrize(
        ("treatment", "frozen"),
        [
            (Treatment(freeze=("*.mlp.gate.weight", "lm_head.*")), r"mlp\.gate\.|lm_head"),
            (Treatment(only=("*.self_attn.*",)), r"^((?!self_attn).)*$"),
            (Treatment(only=("*.mlp.*",), freeze=("*.experts.1.*",)), r"experts\.1\.|^((?!\.mlp\.).)*$"),
        ],
        ids=["freeze", "only", "both"],
    )
    def test_frozen_tensors_are_the_bases(self, models, treatment, frozen, tmp_path):
        sources = Sources.open(models[1:], models[0], "task_arithmetic", treatment=treatment)
        base = load_file(models[0] / "model.safetensors")
        merged = [name for name in base if not re.search(frozen, name)]
        assert set(sources.layout.tensors) == set(merged)
        assert sources.layout.size == sum(base[name].numel() for name in merged)
        export = exported(sources, tmp_path)
        written = load_file(export / "model.safetensors")
        assert written.keys() == base.keys()
        assert all(torch.equal(written[name], base[name]) == (name not in merged) for name in base)
        model = loaded(export)
        for stack in (0, 1 << 26):
            resident = Resident(sources, "auto", CPU, stack_bytes=stack)
            for _ in range(2):
                (shown,) = resident.show([merge_of(sources)])
                assert torch.equal(logits(shown), logits(model))
                own = resident.expert(sources.names[1])  # with the tensors that are frozen in merges
                assert torch.equal(logits(own), logits(loaded(models[2])))
        values = resident.gradient(merge_of(sources), lambda module: iter([logits(module).square().sum()]))[1]
        assert np.isfinite(values).all()
        assert (values != 0).all()
        (told,) = [finding.text for finding in _models(sources) if finding.subject == "frozen"]
        assert told.startswith(f"{len(base) - len(merged):,} tensors (")

    def test_frozen_tensors_may_have_other_shapes(self, models):
        rewritten(models[2], lambda tensors: tensors | {"lm_head.weight": torch.ones(7, 5)})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            Sources.open(models[1:], models[0], "task_arithmetic")
        sources = Sources.open(
            models[1:], models[0], "task_arithmetic", treatment=Treatment(freeze=("lm_head.weight",))
        )
        assert scored(sources).isfinite().all()

    @pytest.mark.parametrize("architecture", [None, Call(call="test_matching:network")], ids=["tensors", "own module"])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_models_without_a_configuration(self, architecture, dtype, tmp_path):
        experts = []
        for seed in range(2):
            torch.manual_seed(seed)
            experts.append(tmp_path / f"{seed}.safetensors")
            save_file(network().state_dict(), experts[-1])
        sources = Sources.open(experts, treatment=Treatment(freeze=("1.*",)))
        for stack in (0, 1 << 20):
            resident = Resident(sources, architecture, CPU, dtype, stack)
            (model,) = resident.show([Genome.uniform(sources.layout.size, [0.5, 0.5])])
            state = model.state_dict() if isinstance(model, nn.Module) else model
            first = load_file(experts[0])
            assert torch.equal(state["1.weight"], first["1.weight"].to(dtype or torch.float32))
            assert not torch.equal(state["0.weight"], first["0.weight"].to(dtype or torch.float32))

    def test_a_tied_tensor_may_have_either_name(self, tmp_path):
        models = families("llama", tmp_path, tie_word_embeddings=True)
        for pattern in ("lm_head.weight", "*.embed_tokens.weight"):
            rewritten(
                models[0], lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
            )
            sources = Sources.open(models[1:], models[0], "task_arithmetic", treatment=Treatment(freeze=(pattern,)))
            assert sources.layout.kept == {"model.embed_tokens.weight"}
            assert torch.equal(logits(loaded(exported(sources, tmp_path / pattern[:3]))), scored(sources))

    def test_a_run_names_experts_with_frozen_tensors_so(self, tmp_path):
        merge = {"operator": "task_arithmetic", "freeze": ["*.mlp.gate.weight"]}
        _, run = run_through("qwen3_moe", tmp_path, {**RANDOM, "merge": merge})
        assert [one.id for one in run.references()] == ["base", "a (frozen)", "b (frozen)", "average (frozen)"]

    @pytest.mark.parametrize(
        ("treatment", "message"),
        [
            (Treatment(freeze=("*.mlp.gates.weight",)), r"merge\.freeze: .*'\*\.mlp\.gates\.weight', which fits none"),
            (Treatment(only=("layers",)), r"merge\.only: .*'layers', which fits none"),
            (Treatment(freeze=("*",)), r"merge\.freeze: expected patterns that leave tensors to merge"),
        ],
        ids=["no tensor", "no tensor either", "nothing left"],
    )
    def test_patterns_must_fit(self, models, treatment, message):
        with pytest.raises(InputError, match=message):
            Sources.open(models[1:], models[0], "task_arithmetic", treatment=treatment)


def test_tied_bytes_are_compared_once(tmp_path, monkeypatch):
    base, *_ = families("llama", tmp_path, tie_word_embeddings=True)
    rewritten(base, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    from ecotone.merging.models import ties
    from ecotone.merging.models.checkpoint import Checkpoint

    compared = []
    monkeypatch.setattr(ties.torch, "equal", lambda *pair: compared.append(pair) or True)
    model = Checkpoint.open(base)
    assert Layout.of(model).aliases == Layout.of(model).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert len(compared) == 1


HEADS = {
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    "distilbert": ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    "mamba": ("lm_head.weight", "backbone.embeddings.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
}


class TestTiesOfFamilies:
    """Embeddings and outputs have the names that transformers' classes tie, whatever they are."""

    @pytest.mark.parametrize("name", HEADS)
    @pytest.mark.parametrize("stored", ["ttd", "dtt", "tdt", "ddd", "ted"])
    def test_exports_load_to_what_was_scored(self, name, stored, tmp_path):
        """Of three models the head is tied (t), stored twice with equal bytes (e), or another tensor (d)."""
        head, embedding = HEADS[name]
        config, paths = saved(FAMILIES[name], tmp_path)
        generator = torch.Generator().manual_seed(1)
        for path, kind in zip(paths, stored, strict=True):
            tensors = load_file(path / "model.safetensors")
            if embedding not in tensors:
                pytest.skip("the tests' model of this family ties nothing")
            own = tensors[embedding].clone()
            noise = 0.3 * torch.randn(own.shape, generator=generator)
            rewritten(path, lambda tensors, kind=kind, own=own, noise=noise: {
                **{key: one for key, one in tensors.items() if key != head},
                **({} if kind == "t" else {head: own if kind == "e" else own + noise}),
            })  # fmt: skip
            configured(path, tie_word_embeddings=True)
        sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
        assert head in sources.layout.parameters
        torch.manual_seed(1)
        inputs = FAMILIES[name].inputs(config)
        resident = Resident(sources, "auto", CPU, stack_bytes=0)
        kind = type(resident.model)
        for path, expert in zip(paths[1:], sources.names, strict=True):
            plain = kind.from_pretrained(path).eval()
            torch.testing.assert_close(resident.expert(expert)(**inputs).logits, plain(**inputs).logits)
        (shown,) = resident.show([merge_of(sources)])
        found = shown(**inputs).logits
        model, told = kind.from_pretrained(exported(sources, tmp_path), output_loading_info=True)
        assert not told["missing_keys"]
        torch.testing.assert_close(model.eval()(**inputs).logits, found)

    def test_a_file_that_was_rewritten_is_read_again(self, tmp_path):
        base, one, _ = families("llama", tmp_path, tie_word_embeddings=True)
        for path in (base, one):
            rewritten(path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        assert "lm_head.weight" not in Sources.open([one], base).layout.parameters
        rewritten(one, lambda tensors: {**tensors, "lm_head.weight": 2 * tensors["lm_head.weight"]})
        assert "lm_head.weight" in Sources.open([one], base).layout.parameters


class TestHeads:
    @pytest.fixture
    def models(self, tmp_path) -> list[Path]:
        """A base without a head, and two experts with one."""
        base, *experts = families("llama", tmp_path)
        rewritten(base, lambda tensors: {key: one for key, one in tensors.items() if key != "lm_head.weight"})
        configured(base, architectures=["LlamaModel"])
        return [base, *experts]

    def test_they_are_not_taken_from_one_expert_without_a_word(self, models):
        for config in ("same", "first", "each"):
            with pytest.raises(CheckpointError, match=r"architectures|lm_head\.weight"):
                Sources.open(models[1:], models[0], "task_arithmetic", treatment=Treatment(known=True), config=config)

    def test_a_choice_computes_without_them(self, models):
        sources = Sources.open(models[1:], models[0], "task_arithmetic", treatment=Treatment(known=True), config="base")
        assert "lm_head.weight" in sources.layout.kept
        assert type(Resident(sources, "auto", CPU).model).__name__ == "LlamaModel"
