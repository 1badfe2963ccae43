"""Model files that change under a search: rewritten in place, cut short, replaced, touched; and their hashes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from parts import objective
from safetensors.numpy import save_file

from ecotone.fitness.pools import Batch, SerialPool
from ecotone.fitness.ray.models import Opened, SameModels
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.models import files
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.files import Files, ModelChangedError
from ecotone.merging.sources import Sources
from ecotone.populations import contents
from ecotone.populations.contents import changes, content
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Trial

MODULE = """
import os, pathlib

def first(model): return float(model["w"][0, 0])
def rewrites(model, file, mark):
    # Writes into a file of weights while a candidate is scored, once, and hides it from mtime.
    if pathlib.Path(mark).exists():
        pathlib.Path(mark).unlink()
        before = os.stat(file)
        with open(file, "r+b") as opened:
            opened.seek(-4, 2)
            opened.write(b"abcd")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return float(model["w"][0, 0])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two models of a matrix and the module of objectives."""
    (tmp_path / "contents_tested.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(files, "MOMENT", -1.0)  # every glance is a look
    monkeypatch.delitem(sys.modules, "contents_tested", raising=False)
    for seed, name in enumerate("ab"):
        save_file({"w": np.random.default_rng(seed).standard_normal((8, 4))}, tmp_path / f"{name}.safetensors")
    return tmp_path


def spec_of(folder, function="first", **arguments):
    score = objective("f", "call", call=f"contents_tested:{function}", arguments=arguments)
    return WorkerSpec((str(folder / "a.safetensors"), str(folder / "b.safetensors")), search=(score,), device="cpu")


def batch(number):
    return Batch(number, (Trial(number, Genome.uniform(32, [0.5, 0.5])),))


def score(pool, number):
    pool.submit(batch(number))
    ((_, (evaluation,)),) = pool.completed()
    return evaluation


def rewritten(file, keep_time=False):
    """Other bytes of the same size in the same file."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-8, 2)
        opened.write(b"changed!")
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)


def replaced(file):
    other = file.with_suffix(".new")
    shutil.copy(file, other)
    rewritten(other)
    other.replace(file)


# -- a batch after the other ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewritten, r"a\.safetensors: .* it was written: its hash was [0-9a-f]{12} and is [0-9a-f]{12}"),
        (lambda file: rewritten(file, keep_time=True), "it was written: its hash was"),
        (cut, r"it had \d+ bytes and has \d+"),
        (replaced, "another file was put in its place: its hash was"),
        (lambda file: file.unlink(), "it is gone"),
    ],
    ids=["rewritten", "rewritten with its time", "cut", "replaced", "removed"],
)
def test_a_file_that_changes_between_batches_ends_the_search(folder, change, words):
    with SerialPool(spec_of(folder)) as pool:
        pool.start()
        assert score(pool, 0).ok
        change(folder / "a.safetensors")
        with pytest.raises(ModelChangedError, match=words):
            score(pool, 1)


def test_results_of_the_batch_in_which_a_file_changes_are_not_given_out(folder):
    mark = folder / "mark"
    with SerialPool(spec_of(folder, "rewrites", file=str(folder / "b.safetensors"), mark=str(mark))) as pool:
        pool.start()
        assert score(pool, 0).ok
        mark.touch()
        with pytest.raises(ModelChangedError, match=r"b\.safetensors: .* it was written: its hash was"):
            score(pool, 1)


def test_what_leaves_the_bytes_alone_ends_nothing(folder):
    file = folder / "a.safetensors"
    with SerialPool(spec_of(folder)) as pool:
        pool.start()
        before = score(pool, 0)
        file.chmod(0o600)
        os.link(file, folder / "link")
        assert score(pool, 1).scores == before.scores
        os.utime(file)
        assert score(pool, 2).scores == before.scores
        shutil.copy(file, folder / "copy")
        (folder / "copy").replace(file)
        assert score(pool, 3).scores == before.scores
        pool.check_models()


def test_small_files_are_compared_at_the_end(folder):
    for name in "ab":
        (folder / name).mkdir()
        (folder / f"{name}.safetensors").replace(folder / name / "model.safetensors")
        (folder / name / "tokenizer_config.json").write_text('{"a": 1}')
        (folder / name / "README.md").write_text("about")
        (folder / name / "trainer_state.json").write_text("{}")
    spec = replace(spec_of(folder), experts=(str(folder / "a"), str(folder / "b")))
    with SerialPool(spec) as pool:
        space = pool.start()
        assert set(space.contents["models.experts[0]"]) == {"model.safetensors", "tokenizer_config.json"}
        (folder / "a" / "README.md").write_text("more about")
        pool.check_models()
        (folder / "a" / "tokenizer_config.json").write_text('{"a": 2}')
        with pytest.raises(ModelChangedError, match=r"models\.experts\[0\]: tokenizer_config\.json has changed"):
            pool.check_models()


def test_a_file_that_is_replaced_after_its_header_was_read_is_not_mapped(folder):
    model = Checkpoint.open(folder / "a.safetensors")
    replaced(folder / "a.safetensors")
    with pytest.raises(CheckpointError, match="found another one in its place"):
        model.tensor("w")


def test_a_link_is_the_file_that_it_means(folder):
    (folder / "blobs").mkdir()
    (folder / "a.safetensors").replace(folder / "blobs" / "0123")
    (folder / "a.safetensors").symlink_to("blobs/0123")
    with SerialPool(spec_of(folder)) as pool:
        space = pool.start()
        [entry] = space.contents["models.experts[0]"].values()
        assert entry["xxh3_128"] == content(folder / "blobs" / "0123").digest
        rewritten(folder / "blobs" / "0123")
        with pytest.raises(ModelChangedError, match="it was written"):
            score(pool, 0)


@pytest.mark.slow
def test_a_mapped_file_that_is_cut_short_ends_a_process_with_words(folder):
    """SIGBUS: nothing can be caught, but it is not silent."""
    program = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(folder)!r}]
        from ecotone.experiments import bus_errors
        from ecotone.merging.models.checkpoint import Checkpoint
        file = {str(folder / "large.safetensors")!r}
        with bus_errors.told("Go on with: ecotone resume x"):
            tensor = Checkpoint.open(file).tensor("w")
            print(tensor[0])
            open(file, "r+b").truncate(4096)
            print(tensor.sum())
        """
    )
    save_file({"w": np.zeros(10**6)}, folder / "large.safetensors")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "a mapped file of a model was cut short" in done.stderr
    assert done.stderr.rstrip().endswith("Go on with: ecotone resume x")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_files_of_adapters_shards_and_wrapped_models(tmp_path):
    pytest.importorskip("peft")
    from test_adapters import base_of, trained

    kind = base_of("llama", tmp_path / "base", tie_word_embeddings=False)
    trained(kind, tmp_path / "base", tmp_path / "a", rows=68, target_modules=["q_proj"], modules_to_save=["lm_head"])
    kind.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    experts = [tmp_path / "a", tmp_path / "shards"]
    found = Sources.open(experts, tmp_path / "base", "task_arithmetic", vocabulary="union").files().contents
    own = {"config.json", "generation_config.json"}
    assert found["models.base"].keys() == {"model.safetensors", *own}
    assert found["models.experts[0]"].keys() == {"adapter_model.safetensors", "adapter_config.json"}
    shards = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(shards) > 1
    assert found["models.experts[1]"].keys() == {"model.safetensors.index.json", *own, *shards}


# -- hashes --------------------------------------------------------------------------------------------------


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "_FRESH", -(10**12))  # as if it had been written long ago
    file = tmp_path / "large"
    file.write_bytes(b"x" * contents.REMEMBERED)
    first = content(file)
    assert not first.cached
    assert content(file) == replace(first, cached=True)
    rewritten(file, keep_time=True)
    second = content(file)
    assert not second.cached
    assert second.digest != first.digest
    [note] = (tmp_path / "cache" / "contents").iterdir()
    note.write_text("[]")
    assert content(file) == second


def test_a_hash_as_fresh_as_the_file_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(b"x" * contents.REMEMBERED)
    assert [content(file).cached for _ in range(2)] == [False, False]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "large"
    file.write_bytes(b"x" * contents.REMEMBERED)
    assert content(file).digest == content(file).digest
    with pytest.raises(InputError, match="missing: cannot be read"):
        content(tmp_path / "missing")


def test_changes_name_what_was_and_what_is():
    old = {"m": {"a": {"xxh3_128": "1" * 32, "bytes": 1}, "b": {"xxh3_128": "2" * 32, "bytes": 1}}}
    new = {"m": {"a": {"xxh3_128": "3" * 32, "bytes": 1}, "c": {"xxh3_128": "2" * 32, "bytes": 1}}}
    assert list(map(str, changes(old, new))) == [
        "m: a has changed since the run began (was 111111111111, is 333333333333)",
        "m: b is gone, or is not read any more (it was 222222222222)",
        "m: c is read now and was not when the run began",
    ]
    assert changes(old, json.loads(json.dumps(old))) == []


# -- workers of a cluster ------------------------------------------------------------------------------------


def opened(file, host):
    found = Files({"models.experts[0]": Checkpoint.open(file)})
    return Opened(1, "node", host, found.contents, found.mapped)


def test_workers_must_have_the_bytes_of_the_first_one(folder):
    models = SameModels()
    assert models.refusal(opened(folder / "a.safetensors", "one")) is None
    (folder / "far").mkdir()
    shutil.copy(folder / "a.safetensors", folder / "far")
    assert models.refusal(opened(folder / "far" / "a.safetensors", "two")) is None
    rewritten(folder / "far" / "a.safetensors")
    refused = models.refusal(opened(folder / "far" / "a.safetensors", "two"))
    assert "models.experts[0]: a.safetensors on two is not that of the first worker, on one" in refused.message


def test_a_death_is_told_with_the_file_that_was_cut(folder):
    models = SameModels()
    models.check_after_death(OSError("no worker yet"))
    models.refusal(opened(folder / "a.safetensors", "one"))
    os.utime(folder / "a.safetensors")
    models.check_after_death(OSError("died of something else"))
    cut(folder / "a.safetensors")
    with pytest.raises(ModelChangedError, match=r"A worker died \(gone\) .*a\.safetensors had \d+ bytes and has"):
        models.check_after_death(OSError("gone"))


def test_looking_at_files_costs_nothing(folder):
    """Two status calls a file and batch: no file is opened."""
    found = Files({"models.experts[0]": Checkpoint.open(folder / "a.safetensors")})
    assert found.contents["models.experts[0]"]["a.safetensors"]["bytes"] == (folder / "a.safetensors").stat().st_size
    found._hashes.clear()
    assert found.look() is False


@pytest.mark.parametrize("sources", ["host", "mapped"])
def test_models_that_are_kept_in_memory_are_looked_at_now_and_then(folder, monkeypatch, sources):
    monkeypatch.setattr(files, "MOMENT", 1e9)
    with SerialPool(replace(spec_of(folder), sources=sources)) as pool:
        pool.start()
        before = score(pool, 0)  # all is read now
        rewritten(folder / "a.safetensors", keep_time=True)
        if sources == "host":
            assert score(pool, 1).scores == before.scores
        with pytest.raises(ModelChangedError, match="it was written"):
            pool.check_models() if sources == "host" else score(pool, 1)
