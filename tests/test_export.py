import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecotone.merging import export
from ecotone.merging.export import export_directory, export_file
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, InputError
from ecotone.populations.genome import Genome

RECORD = {"lineage": [3, 1], "scores": {"accuracy": 0.5}}


def plain(directory, count=3, dtype=torch.bfloat16):
    paths = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.weight": torch.randn(33, 7, generator=generator).to(dtype) for i in range(12)}
        tensors |= {"norm.weight": torch.randn(5, generator=generator), "steps": torch.tensor(seed)}
        tensors |= {"mask": torch.tensor([True, False, True]), "nothing": torch.zeros(0, 2)}
        paths.append(directory / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def genome_of(sources):
    rng = np.random.default_rng(1)
    borders = np.unique([0, *rng.integers(1, sources.layout.size, 40), sources.layout.size])
    return Genome(borders, rng.normal(size=(len(borders) - 1, len(sources.experts))))


def materialised(sources, genome, dtype=None):
    out = {n: torch.empty(i.shape, dtype=dtype or i.dtype) for n, i in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out | sources.buffers()


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.fixture
def sources(tmp_path):
    paths = plain(tmp_path)
    return Sources.open(paths[1:], paths[0], "task_arithmetic")


@pytest.mark.parametrize("dtype", [None, "float32", torch.float16])
@pytest.mark.parametrize("buffer_bytes", [64, export.BUFFER_BYTES])
def test_exported_file_holds_the_bytes_of_materialise(sources, tmp_path, dtype, buffer_bytes, monkeypatch):
    monkeypatch.setattr(export, "BUFFER_BYTES", buffer_bytes)
    path = export_file(sources, genome_of(sources), tmp_path / "merged.safetensors", RECORD, dtype)
    kind = torch.float32 if dtype == "float32" else dtype
    same(load_file(path), materialised(sources, genome_of(sources), kind))
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["ecotone"]) == RECORD
        assert file.metadata()["format"] == "pt"
    again = Checkpoint.open(path)
    same({name: again.tensor(name) for name in again.tensors}, load_file(path))
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def hugging_face(directory: Path, tied: bool, seeds=(0, 1, 2)) -> list[Path]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    paths = []
    for seed in seeds:
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        paths.append(directory / f"model-{seed}")
        model.save_pretrained(paths[-1])
    (paths[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    (paths[0] / "chat_template.jinja").write_text("{{ messages }}")
    (paths[0] / "LICENSE").write_text("Apache-2.0")
    (paths[0] / "modeling_evil.py").write_text("raise SystemExit")
    (paths[0] / "optimizer.bin").write_bytes(b"x")
    (paths[0] / "README.md").write_text("the base's card")
    return paths


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 4_000])
def test_exported_directory_loads_as_a_hugging_face_model(tmp_path, tied, shard_bytes):
    paths = hugging_face(tmp_path, tied)
    from transformers import AutoModelForCausalLM

    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    assert sources.layout.blocks[-2:] == ("model.layers.10", "model.norm")
    genome = genome_of(sources)
    target = export_directory(sources, genome, tmp_path / "merged", "# Card", RECORD, shard_bytes=shard_bytes)
    files = {file.name for file in target.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md", "ecotone.json"} <= files
    assert not {"modeling_evil.py", "optimizer.bin"} & files
    assert ("model.safetensors.index.json" in files) == (shard_bytes == 4_000)
    assert (target / "README.md").read_text() == "# Card"
    assert json.loads((target / "ecotone.json").read_text()) == RECORD

    expected = materialised(sources, genome)
    again = Checkpoint.open(target)
    assert again.is_hugging_face
    same({name: again.tensor(name) for name in again.tensors}, expected)
    model, report = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    same({name: p.detach() for name, p in model.named_parameters()}, expected)

    resident = AutoModelForCausalLM.from_pretrained(paths[1], dtype="auto")
    sources.materialise([genome], [dict(resident.named_parameters())])
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(resident(tokens).logits, model(tokens).logits)


def test_tied_checkpoints_that_store_both_weights(tmp_path):
    paths = hugging_face(tmp_path, tied=True)
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    sources = Sources.open(paths)
    assert sources.layout.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    target = export_directory(sources, genome_of(sources), tmp_path / "merged", "", {})
    assert "lm_head.weight" not in Checkpoint.open(target).tensors
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    same({n: p.detach() for n, p in model.named_parameters()}, materialised(sources, genome_of(sources)))


def test_changing_the_type_changes_the_configuration(tmp_path):
    paths = hugging_face(tmp_path, tied=False, seeds=(0, 1))
    sources = Sources.open(paths)
    target = export_directory(sources, genome_of(sources), tmp_path / "merged", "", {}, dtype="float32")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert model.dtype == torch.float32
    same({n: p.detach() for n, p in model.named_parameters()}, materialised(sources, genome_of(sources), torch.float32))


def test_targets_that_are_in_the_way_are_refused(sources, tmp_path):
    genome = genome_of(sources)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(InputError, match="new or empty directory"):
        export_directory(sources, genome, tmp_path / "full", "", {})
    with pytest.raises(InputError, match=r"config\.json.*plain weights.*\.safetensors file"):
        export_directory(sources, genome, tmp_path / "new", "", {})
    with pytest.raises(InputError, match="the file exists"):
        export_file(sources, genome, tmp_path / "0.safetensors", {})
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        export_file(sources, genome, tmp_path / "merged.bin", {})
    with pytest.raises(InputError, match="does not exist"):
        export_file(sources, genome, tmp_path / "no" / "merged.safetensors", {})
    with pytest.raises(InputError, match=r"dtype: expected one of float32.*'int8'"):
        export_file(sources, genome, tmp_path / "merged.safetensors", {}, dtype="int8")
    with pytest.raises(InputError, match="parameters, found 5"):
        export_file(sources, Genome.uniform(5, [1, 1]), tmp_path / "merged.safetensors", {})


def test_an_empty_directory_is_filled(tmp_path):
    paths = hugging_face(tmp_path, tied=False, seeds=(0, 1))
    (tmp_path / "merged").mkdir()
    sources = Sources.open(paths)
    export_directory(sources, genome_of(sources), tmp_path / "merged", "", {})
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_full_disk_is_refused_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="of free disk, found 10 bytes"):
        export_file(sources, genome_of(sources), tmp_path / "merged.safetensors", {})


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path):
    paths = hugging_face(tmp_path, tied=False, seeds=(0, 1))
    sources = Sources.open(paths)
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(EcotoneError, match="could not be written"):
            export_directory(sources, genome_of(sources), tmp_path / "merged", "", {})
        with pytest.raises(EcotoneError, match="could not be written"):
            export_file(sources, genome_of(sources), tmp_path / "merged.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before


PEAK = """
import re, sys, threading, time
from pathlib import Path
import numpy as np, torch
from ecotone.merging.export import export_file
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(2)
peak, stop = 0.0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

sources = Sources.open(sys.argv[2:4], sys.argv[1], sys.argv[5])
start = anonymous()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
edges = np.unique(np.linspace(0, sources.layout.size, 64).astype(np.int64))
export_file(sources, Genome(edges, np.full((len(edges) - 1, 2), 0.4)), sys.argv[4], {})
stop.set()
watcher.join()
print(start, peak)
"""


def big(path: Path, nbytes: int, seed: int) -> Path:
    torch.manual_seed(seed)
    count = 4
    tensor = torch.randn(nbytes // 2 // count // 1024, 1024).to(torch.bfloat16)
    save_file({f"layers.{i}.weight": tensor.roll(i).clone() for i in range(count)}, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("nbytes", "limit", "growth"),
    [(64_000_000, 300, 150), (1_000_000_000, 300, 150)],
    ids=["64 MB", "1 GB"],
)
@pytest.mark.parametrize("operator", ["task_arithmetic", "ties_vectors"])
@pytest.mark.slow
def test_export_needs_a_few_chunks_of_memory(tmp_path, nbytes, limit, growth, operator):
    """``limit`` and ``growth`` are MB of anonymous resident memory: in all (torch included), and by the export.

    The export itself takes about 20 MB; numba, where it is installed, 40 more, or 100 when it compiles at first use.
    """
    paths = [big(tmp_path / f"{seed}.safetensors", nbytes, seed) for seed in range(3)]
    arguments = [sys.executable, "-c", PEAK, *map(str, paths), str(tmp_path / "merged.safetensors"), operator]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=250)
    assert answer.returncode == 0, answer.stderr
    start, peak = map(float, answer.stdout.split())
    print(f"{nbytes / 1e6:.0f} MB a model: {start:.0f} MB before, {peak:.0f} MB at most")
    assert peak < limit
    assert peak - start < growth
    assert (tmp_path / "merged.safetensors").stat().st_size > nbytes * 0.99


# -- disks that fail, and exports that are killed ------------------------------------------------------------


def written(sources, target: Path) -> Path:
    if target.suffix:
        return export_file(sources, genome_of(sources), target, RECORD)
    return export.export_plain_directory(sources, genome_of(sources), target, "# Card", RECORD)


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "link"])
def test_a_disk_that_fails_leaves_nothing_at_the_target(sources, tmp_path, monkeypatch, name, number, call):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    place = {"write": export._Writer, "fsync": os, "replace": Path, "link": os}[call]
    monkeypatch.setattr(place, "_write_tensor" if call == "write" else call, fail)
    target = tmp_path / "out" / name
    target.parent.mkdir()
    if (call, name) in (("link", "merged"), ("replace", "merged.safetensors")):
        written(sources, target)  # a folder is renamed, a file linked
        return
    with pytest.raises(EcotoneError, match=rf"{name}: the export could not be written .*{os.strerror(number)}"):
        written(sources, target)
    assert list(target.parent.iterdir()) == []
    monkeypatch.undo()
    assert written(sources, target) == target


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_everything_is_on_the_disk_before_it_has_its_name(sources, tmp_path, monkeypatch, name):
    target, events = tmp_path / "out" / name, []
    target.parent.mkdir()
    synchronise = os.fsync

    def noted(handle):
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        events.append(target.exists())
        synchronise(handle)

    monkeypatch.setattr(os, "fsync", noted)
    written(sources, target)
    before = {Path(path).name for path, there in zip(events[::2], events[1::2], strict=True) if not there}
    files = {path.name for path in target.iterdir()} if target.is_dir() else set()
    assert files <= before
    assert any(one.endswith(".partial") for one in before)
    assert events[-2:] == [str(target.parent), True]


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_of_two_exports_to_one_target_one_wins(sources, tmp_path, monkeypatch, name):
    target = tmp_path / name
    synchronise = export.files.all_synchronised

    def slow(draft):
        monkeypatch.setattr(export.files, "all_synchronised", synchronise)
        written(sources, target)
        (target / "mark" if target.is_dir() else tmp_path / "mark").write_text("of the first")
        synchronise(draft)

    monkeypatch.setattr(export.files, "all_synchronised", slow)
    with pytest.raises(InputError, match="something else was written there meanwhile, which is kept"):
        written(sources, target)
    assert next(tmp_path.rglob("mark")).read_text() == "of the first"
    assert [path for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_what_a_killed_export_left_is_removed_by_the_next_one(sources, tmp_path, caplog, name):
    pid = os.fork()
    if not pid:  # the child is killed in the middle of its export
        export._Writer._write_tensor = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        written(sources, tmp_path / name)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if "partial" in path.name)
    with caplog.at_level("WARNING", "ecotone"):
        written(sources, tmp_path / "other.safetensors")
    assert not left.exists()
    assert f"{left}: removed what an export that was killed had left behind." in caplog.text
