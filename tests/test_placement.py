"""Where sources are kept: the same bits everywhere, chosen by free memory, refused where there is none; measured."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import ecotone.merging.memory
from ecotone.fitness.backends import resident
from ecotone.fitness.backends.resident import STACK_BYTES, stack_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging import placement
from ecotone.merging.gradient import Slopes
from ecotone.merging.placement import Bytes, Free, Needs, chosen, settled
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.testing.operators import streamed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLACEMENTS = ["device", "host", "mapped"]
SHAPES = {"embed_tokens.weight": (40, 6), "layers.0.bias": (7,), "layers.0.weight": (7, 600), "layers.1.weight": (6, 7)}
MB = 10**6


def bits(tensor):
    return tensor.flatten().contiguous().view(torch.uint8)


def written(folder, dtype, adapters):
    """A base and two experts: checkpoints, or LoRA adapters of one of its matrices."""
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"{name}.safetensors" for name in ("base", "a", "b")]
    for path in paths:
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        save_file(tensors | {"steps": torch.tensor(3)}, path)
    if not adapters:
        return paths
    for index in (1, 2):
        paths[index] = folder / f"adapter{index}"
        paths[index].mkdir()
        factors = {"A": torch.randn(2, 600, generator=generator), "B": torch.randn(7, 2, generator=generator)}
        tensors = {f"base_model.model.layers.0.lora_{part}.weight": value for part, value in factors.items()}
        save_file(tensors, paths[index] / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
        (paths[index] / "adapter_config.json").write_text(json.dumps(settings))
    return paths


def genomes_of(sources):
    rng = np.random.default_rng(0)
    borders = np.unique([0, *rng.integers(1, sources.layout.size, 9), sources.layout.size])
    columns = len(sources.operator.columns(sources.names))
    rows = [rng.normal(size=(len(borders) - 1, columns)) for _ in range(2)]
    settings = [{"density": density} for density in (0.3, 0.6)] if "density" in sources.operator.searchable else []
    return [Genome(borders, row) for row in rows] + [Genome(borders, rows[0], each) for each in settings]


def merges(sources, device=CPU):
    """Bits of stacked merges, of merges in place, twice over, and slopes."""
    genomes = genomes_of(sources)
    found = list(sources.stack(genomes, torch.bfloat16, device).values())
    for _ in range(2):
        kinds = [torch.float32, torch.float16, torch.float32, torch.bfloat16][: len(genomes)]
        outs = [
            {
                name: torch.empty(info.shape, dtype=kind, device=device)
                for name, info in sources.layout.parameters.items()
            }
            for kind in kinds
        ]
        for genome, out in zip(genomes, outs, strict=True):
            sources.materialise([genome], [out])
        found += [tensor for out in outs for tensor in out.values()]
    return [bits(tensor).cpu() for tensor in found]


def slopes(sources, device=CPU):
    table = []
    for genome in genomes_of(sources) if sources.operator.affine else []:
        collected = Slopes(sources, genome)
        for name, shape in SHAPES.items():
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device)
            collected.add(name, gradient)
        table.append(collected.values)
    return np.array(table)


# -- the same bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", streamed())
@pytest.mark.parametrize("adapters", [False, True], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_placement(tmp_path, monkeypatch, operator, adapters, dtype):
    paths = written(tmp_path, dtype, adapters)
    plain = Sources.open(paths[1:], paths[0], operator)
    expected, derivatives = merges(plain), slopes(plain)
    for limit in (ecotone.merging.memory.RESIDENT_BYTES, 0):  # rows of small models are kept, or not
        monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", limit)
        for place in PLACEMENTS:
            sources = Sources.open(paths[1:], paths[0], operator, placement=place)
            assert all(torch.equal(a, b) for a, b in zip(merges(sources), expected, strict=True)), place
            assert (slopes(sources) == derivatives).all(), place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", streamed())
@pytest.mark.parametrize("adapters", [False, True], ids=["checkpoints", "adapters"])
@pytest.mark.parametrize("place", [*PLACEMENTS, "auto"])
def test_bits_do_not_depend_on_the_placement_on_a_gpu(tmp_path, monkeypatch, operator, adapters, place):
    paths = written(tmp_path, torch.bfloat16, adapters)
    plain = Sources.open(paths[1:], paths[0], operator)
    expected, derivatives = merges(plain), slopes(plain)
    for limit in (ecotone.merging.memory.RESIDENT_BYTES, 0):
        monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", limit)
        sources = Sources.open(paths[1:], paths[0], operator, placement=place)
        assert all(torch.equal(a, b) for a, b in zip(merges(sources, CUDA), expected, strict=True))
        np.testing.assert_allclose(slopes(sources, CUDA), derivatives, rtol=1e-3, atol=1e-3)
        held = [tensor for tensors in sources.held.kept.values() for each in tensors.values() for tensor in each]
        place_of = sources.held.placed(CUDA)
        assert bool(held) == (place_of != "mapped")
        assert all(tensor.is_cuda if place_of == "device" else tensor.is_pinned() for tensor in held)


# -- what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["linear", "dare"])
@pytest.mark.parametrize("adapters", [False, True], ids=["checkpoints", "adapters"])
def test_what_is_kept_is_what_headers_say(tmp_path, monkeypatch, operator, adapters):
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    paths = written(tmp_path, torch.bfloat16, adapters)
    for place in ("host", "device", "mapped"):
        sources = Sources.open(paths[1:], paths[0], operator, placement=place)
        needs = sources.memory.needs(CPU)
        assert sources.held.loads == 0
        merges(sources)
        held = [tensor for tensors in sources.held.kept.values() for each in tensors.values() for tensor in each]
        own = {tensor.data_ptr(): tensor.nbytes for tensor in held}
        assert sum(own.values()) == (needs.sources["host"].host if place != "mapped" else 0)
        assert "_matrix" not in sources.__dict__ or sources._matrix is None
    models, rest = len(sources.checkpoints), sources.layout.size - 4200
    changed = 2 * 4 * 4200 + (models - 2) * 2 * 4200  # by the adapters, which are formed in float32
    assert needs.sources["host"].host == (changed + 2 * rest if adapters else models * 2 * (4200 + rest))


def test_a_gpu_is_the_same_with_and_without_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    sources = Sources.open(written(tmp_path, torch.bfloat16, adapters=False)[1:])
    sources.held.place(CUDA, "host")
    assert sources.held.placed(torch.device("cuda", 1)) == "host"
    assert sources.held.placed(CPU) == "mapped"


def test_small_models_are_kept_as_rows_unless_they_are_to_be_mapped(tmp_path):
    paths = written(tmp_path, torch.bfloat16, adapters=False)
    for operator, place, settled_as in (
        ("ties", "auto", "host"),
        ("linear", "auto", "mapped"),
        ("ties", "mapped", "mapped"),
    ):
        sources = Sources.open(paths[1:], paths[0], operator, placement=place)
        assert sources.held.placed(CPU) == settled_as
        sources.stack(genomes_of(sources))
        rows = 4 * sources.layout.size * len(sources.checkpoints)
        assert (sources._matrix is None) == (place == "mapped")
        assert sources.held.kept == {}
        needs = sources.memory.needs(CPU, stack=100)
        if operator == "ties" and place == "auto":
            assert needs.sources["host"].host == rows
            assert sources.memory.needs(CPU, settings=True).sources["host"].host == 3 * rows
    mapped = Sources.open(paths[1:], paths[0], placement="mapped")
    auto = Sources.open(paths[1:], paths[0])
    extra = auto.memory.needs(CPU, stack=100).buffers.host - mapped.memory.needs(CPU, stack=100).buffers.host
    assert extra == 4 * auto.layout.size * 2


# -- choosing ------------------------------------------------------------------------------------------------


def needs(formed=False, cuda=True):
    if not cuda:
        places = {"device": Bytes(host=40), "host": Bytes(host=40), "mapped": Bytes()}
        return Needs(Bytes(host=10), Bytes(host=2), places, formed)
    return Needs(Bytes(10), Bytes(2, 3), {"device": Bytes(40), "host": Bytes(host=60), "mapped": Bytes()})


@pytest.mark.parametrize(
    ("free", "place"),
    [
        (Free(70, 0), "device"),
        (Free(69, 1000), "device"),
        (Free(68, 1000), "host"),  # 10 + 2 + 40, and 10 for activations, are more than nine tenths
        (Free(68, 126), "host"),
        (Free(68, 125), "mapped"),  # more than half would be page-locked
        (Free(68, None), "mapped"),
    ],
)
def test_auto_is_the_nearest_place_with_room_for_activations(free, place):
    assert chosen(needs(), free, CUDA) == place
    assert settled("auto", needs(), Free(1000, 1000), free, CUDA) == place


@pytest.mark.parametrize(
    ("free", "formed", "place"),
    [(Free(None, 69), True, "host"), (Free(None, 68), True, "mapped"), (Free(None, 10**6), False, "mapped"),
     (Free(), True, "host")],
)  # fmt: skip
def test_auto_on_a_cpu_copies_only_what_takes_work_to_form(free, formed, place):
    assert chosen(needs(formed, cuda=False), free, CPU) == place


def test_what_is_forced_is_taken_or_refused():
    plenty, nothing = Free(1000, 1000), Free(0, 0)
    assert [settled(wish, needs(), plenty, nothing, CUDA) for wish in PLACEMENTS] == PLACEMENTS
    assert settled("device", needs(cuda=False), plenty, plenty, CPU) == "host"
    said = r"runtime.sources: device: expected 52 bytes on the GPU for each worker .*, found 51 bytes free.*mapped"
    with pytest.raises(InputError, match=said):
        settled("device", needs(), Free(51, 1000), plenty, CUDA)
    with pytest.raises(InputError, match=r"runtime.sources: host: expected 63 bytes in main memory .*found 62 bytes"):
        settled("host", needs(), Free(1000, 62), plenty, CUDA)
    with pytest.raises(InputError, match=r"runtime.sources: device: expected 52 bytes in main memory .*found 51 bytes"):
        settled("device", needs(cuda=False), Free(None, 51), plenty, CPU)
    for wish in ("auto", *PLACEMENTS):
        with pytest.raises(InputError, match=r"^memory: expected 12 bytes on the GPU .*found 11 bytes free.*bfloat16"):
            settled(wish, needs(), Free(11, 1000), plenty, CUDA)
    assert settled("host", needs(), Free(None, None), nothing, CUDA) == "host"  # what is not known is not refused


def test_free_memory_obeys_a_containers_limit(tmp_path, monkeypatch):
    for names, most in (
        (("memory.max", "memory.current"), "1000"),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), "900"),
    ):
        group = tmp_path / names[0]
        group.mkdir()
        (group / names[0]).write_text(f"{most}\n")
        (group / names[1]).write_text("700\n")
        (group / "memory.stat").write_text("anon 400\nactive_file 200\ninactive_file 100\n")
        assert placement._left(group) == int(most) - 400
    (tmp_path / "memory.max" / "memory.max").write_text("max\n")
    assert placement._left(tmp_path / "memory.max") is None
    monkeypatch.setattr(placement, "_groups", lambda: [tmp_path / "memory.limit_in_bytes"])
    monkeypatch.setattr(placement, "_available", lambda: 10**9)
    assert Free.here(CPU) == Free(None, 500)
    assert Free(80, 500).divided(0.5, 4) == Free(40, 125)
    monkeypatch.setattr(placement, "_groups", lambda: [])
    monkeypatch.setattr(placement, "_available", lambda: None)
    assert Free.here(CPU) == Free()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_linux_says_what_is_free():
    assert (Free.here(CPU).host or 0) > MB


# -- workers and recipes -------------------------------------------------------------------------------------


def spec_of(paths, **fields):
    return WorkerSpec(tuple(map(str, paths[1:])), str(paths[0]), device="cpu", **fields)


@pytest.mark.usefixtures("threads")
def test_a_worker_settles_the_placement_before_it_makes_a_model(tmp_path, monkeypatch):
    paths = written(tmp_path, torch.bfloat16, adapters=False)
    for wish, place in (("auto", "mapped"), ("mapped", "mapped"), ("host", "host"), ("device", "host")):
        assert Worker(spec_of(paths, sources=wish))._sources.held.placed(CPU) == place
    small = spec_of(paths, operator="ties", batch=1)
    assert Worker(small)._sources.held.placed(CPU) == "host"
    monkeypatch.setattr(placement, "_available", lambda: 4 * MB)
    monkeypatch.setattr(placement, "_groups", lambda: [])
    assert Worker(small)._sources.held.placed(CPU) == "host"
    assert Worker(spec_of(paths, operator="ties", batch=1, neighbours=50))._sources.held.placed(CPU) == "mapped"
    monkeypatch.setattr(placement, "_available", lambda: 1000)
    monkeypatch.setattr(resident, "Resident", None)
    with pytest.raises(InputError, match=r"memory: expected .* in main memory for each worker"):
        Worker(small)


def test_the_bytes_of_a_stack(tmp_path):
    layout = Sources.open([written(tmp_path, torch.bfloat16, adapters=False)[0]]).layout
    assert stack_of(layout, None) == STACK_BYTES // (2 * layout.size) * 2 * layout.size
    assert stack_of(layout, torch.float32, 8 * layout.size) == 8 * layout.size
    assert stack_of(layout, torch.float32, 7 * layout.size) == 0
    assert stack_of(layout, torch.float32, 4 * layout.size - 1) == 0
    assert stack_of(layout, torch.float32, batch=3) == 3 * 4 * layout.size


def recipe_of(folder, **runtime):
    written(folder, torch.bfloat16, adapters=False)
    (folder / "placement_toys.py").write_text("def score(model):\n    return float(model['layers.0.bias'].sum())\n")
    record = {
        "name": "placed",
        "models": {"experts": ["a.safetensors", "b.safetensors"], "base": "base.safetensors"},
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [{"name": "s", "type": "call", "call": "placement_toys:score"}]},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 2},
        "runtime": {"pool": "serial", **runtime},
        "tracking": {"mlflow": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def test_validate_says_where_sources_are_and_what_a_worker_takes(ecotone, tmp_path, threads):
    recipe = recipe_of(tmp_path)
    found = ecotone("validate", recipe, "--json").json["findings"]
    assert found["sources"].startswith("mapped (auto): 27.0 KB in files")
    assert found["memory"].startswith("a worker (of 1): main memory ")
    assert "(model 9.0 KB, sources 0 bytes, buffers " in found["memory"]
    found = ecotone("validate", recipe, "--json", "--set", "runtime.sources=device").json["findings"]
    assert found["sources"].startswith("host (runtime.sources): 27.0 KB in files, kept in main memory")
    assert "sources 26.9 KB, buffers" in found["memory"]
    elsewhere = ["--set", "runtime.pool=ray", "--set", "runtime.address=auto", "--set", "runtime.gpus_per_worker=0.5"]
    found = ecotone("validate", recipe, "--json", *elsewhere).json["findings"]
    assert "settled where the workers are" in found["sources"]
    assert "the model takes 9.0 KB on the GPU" in found["memory"]
    assert "sources device 26.9 KB on the GPU, host " in found["memory"]


@pytest.mark.parametrize(
    ("free", "settings", "words"),
    [
        (1000, [], ("memory: expected ", "found 1.0 KB free", "fewer workers")),
        (None, ["runtime.sources=host"], ("runtime.sources: host: expected ", "Or say auto, or mapped")),
        (None, ["runtime.sources=devise"], ("runtime.sources", "'devise'")),
    ],
)
def test_validate_and_run_refuse_what_has_no_memory(ecotone, tmp_path, threads, monkeypatch, free, settings, words):
    recipe = recipe_of(tmp_path)
    sources = Sources.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "base.safetensors",
                           "task_arithmetic")  # fmt: skip
    stack = stack_of(sources.layout, None, batch=8)
    enough = sources.memory.needs(CPU, stack=stack).total("mapped").host
    monkeypatch.setattr(placement, "_available", lambda: free or enough + 1000)
    monkeypatch.setattr(placement, "_groups", lambda: [])
    options = [part for setting in settings for part in ("--set", setting)]
    for command in (["validate", recipe], ["run", recipe, "--out", tmp_path / "run"]):
        said = ecotone(*command, *options)
        assert said.code == 1
        assert "Traceback" not in said.err
        assert all(part in " ".join(said.err.split()) for part in words), said.err


# -- measured ------------------------------------------------------------------------------------------------

PEAK = """
import ctypes, json, sys, threading
import numpy as np
from ecotone.fitness.callables import call
from ecotone.fitness.objectives import CallSettings
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.opening import open_sources
from ecotone.fitness.worker import Worker, needs_of
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Trial
import torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def merge(paths):
    spec = WorkerSpec(tuple(paths[1:]), paths[0], operator, sources="mapped", device="cpu", search=objectives)
    worker = Worker(spec)
    worker.space()
    layout = worker._sources.layout
    edges = np.unique(np.linspace(0, layout.size, 64).astype(np.int64))
    trials = [Trial(i, Genome(edges, np.full((len(edges) - 1, len(paths) - 1), 0.4 + i))) for i in range(2)]
    evaluations = worker.measure(trials)
    assert all(evaluation.ok for evaluation in evaluations), evaluations
    return spec

operator, small, large = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
objectives = (CallSettings(name="length", type="call", call="builtins:len"),)
merge(small)  # imports and compiled loops are there
ctypes.CDLL(None).malloc_trim(0)
peak, stop = 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

start = anonymous()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
spec = merge(large)
stop.set()
watcher.join()
needs = needs_of(spec, open_sources(spec), torch.device("cpu")).total("mapped").host
print(json.dumps({"start": start, "peak": peak, "needs": needs}))
"""


def sparse(path, nbytes):
    """A model of zeros in 16 bits that takes no disk."""
    rows = nbytes // 2 // 4 // 1024
    header, at = {}, 0
    for index in range(4):
        header[f"layers.{index}.weight"] = {
            "dtype": "BF16", "shape": [rows, 1024], "data_offsets": [at, at + 2048 * rows]
        }  # fmt: skip
        at += 2048 * rows
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return str(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("nbytes", "experts"),
    [(80 * MB, 3), *[pytest.param(200 * MB, count, marks=pytest.mark.slow) for count in (2, 6)]],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("operator", ["task_arithmetic", pytest.param("ties", marks=pytest.mark.slow)])
def test_with_mapped_sources_a_worker_takes_a_model_and_a_set_of_chunks(tmp_path, nbytes, experts, operator):
    """What ``validate`` states, model + one set of chunks (+ the Gram table), bounds the anonymous memory measured.

    The chunks grow with the number of experts by 2 MB each for a thread, the models' own bytes are never held.
    """
    paths = [sparse(tmp_path / f"{index}.safetensors", nbytes) for index in range(experts + 1)]
    small = [sparse(tmp_path / f"small{index}.safetensors", 12 * MB) for index in range(experts + 1)]
    program = [sys.executable, "-c", PEAK, operator, ",".join(small), ",".join(paths)]
    answer = subprocess.run(program, capture_output=True, text=True, check=False, timeout=900)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    grown, needs = found["peak"] - found["start"], found["needs"]
    print(f"{experts} experts of {nbytes / MB:.0f} MB: {grown / MB:.0f} MB, at most {needs / MB:.0f} MB stated")
    assert needs < nbytes + 100 * MB
    assert grown <= needs
