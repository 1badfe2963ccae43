"""FusionBench, run as a program of its own, makes the merges of `ecotone merge`: the same weights, to rounding.

FusionBench (Tang et al. 2024, arXiv:2406.03280) is the public implementation of many one-shot methods. These agree:

    the average, task arithmetic, SLERP, TIES (mean and sum), EMR's unified vector, Consensus with TALL masks, TSV-M,
    ISO-C, ISO-CTS, OPCM, KnOTS-TIES, RegMean (also with shrunk Gram matrices), RegMean++, Model Stock of two experts

These agree given the same in between: DARE and DARE with TIES given our masks, Fisher merging (also normalised) given
the exact Fisher information, which the driver computes by itself. WUDI agrees once its descent has converged; its usual
300 steps end elsewhere.

Where defaults differ, the settings of `CASES` say the same to both, and a comment says how. FusionBench has none of our
other operators. Tolerances stand in `NEAR`, by type, as shares of a tensor's largest change.

ECOTONE_FUSIONBENCH is the Python of an environment that FusionBench is installed in (`make fusionbench` makes one).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import drive
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecotone.experiments import one_shot
from ecotone.merging.operators.dare import Masks
from ecotone.merging.sources import Sources

PROGRAM = os.environ.get("ECOTONE_FUSIONBENCH", "")
pytestmark = [
    pytest.mark.skipif(not PROGRAM, reason="ECOTONE_FUSIONBENCH names no Python; `make fusionbench` installs one"),
    pytest.mark.timeout(900),
]

WIDTH, HIDDEN, CLASSES = 8, 13, 3
ROWS = 60

# What both programs import: the modules of the models, and the inputs of a task.
NETS = f"""
import torch
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm = nn.LayerNorm({WIDTH})
        self.up = nn.Linear({WIDTH}, {HIDDEN}, bias)
        self.down = nn.Linear({HIDDEN}, {WIDTH}, bias)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks=2, bias=True):
        super().__init__()
        self.layers = nn.ModuleList(Block(bias) for _ in range(blocks))
        self.head = nn.Linear({WIDTH}, {CLASSES}, bias)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def inputs(path):
    return load_file(path)["inputs"]
"""

# One process for all merges: importing FusionBench takes longer than to merge.
DRIVER = """
import json, sys, types
from pathlib import Path

sys.path.insert(0, sys.argv[2])
sys.modules["ray"] = None
import fusion_bench.method
import torch
from fusion_bench import BaseModelPool
from fusion_bench.method.dare import DareTaskArithmetic, DareTiesMerging
from fusion_bench.method.emr_merging import EMRMerging
from fusion_bench.method.fisher_merging.fisher_merging import FisherMergingAlgorithm
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import regmean_merging
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.slerp import SlerpMergeAlgorithm
from fusion_bench.method.tall_mask import utils as tall
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.method.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi import WUDIMerging
from fusion_bench.utils.parameters import state_dict_to_vector, vector_to_state_dict
from safetensors.torch import load_file, save_file

from nets import Net, inputs

# The package of OPCM imports modules for CLIP that today's transformers lacks; the method itself does not. With Ray its
# class is made an actor, which breaks it.
package = types.ModuleType("fusion_bench.method.opcm")
package.__path__ = [str(Path(fusion_bench.method.__file__).with_name("opcm"))]
sys.modules[package.__name__] = package
from fusion_bench.method.opcm.opcm_general import OPCM


class Pool(BaseModelPool):
    def load_train_dataset(self, name):
        return self.data[name]


class ExactFisher(FisherMergingAlgorithm):
    # The base class leaves the weights to others. Its norms are averaged here, as ours are.
    def get_fisher_weights(self, model_name, model, train_dataset, param_names_to_merge):
        found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for row in train_dataset:
            logs = torch.log_softmax(model(row[None]), -1)[0]
            for log in logs:
                grads = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
                for name, grad in zip(found, grads):
                    found[name] += log.detach().exp() * grad**2 / len(train_dataset)
        return {name: torch.ones_like(value) if ".norm." in name else value for name, value in found.items()}


class Trainer:
    _train_batch_size = 20

    def __init__(self, rows):
        self.rows = rows

    def get_train_dataloader(self):
        return [{"x": rows} for rows in self.rows.split(self._train_batch_size)]

    def _prepare_inputs(self, batch):
        return batch


class LayerByLayer(RegMeanAlgorithmPlusPlus):
    def merge_embedding_layer(self, models_to_merge_dict):
        return {}

    def get_input_for_first_layer(self, model, train_dataset):
        return [train_dataset]

    def get_layers(self, model):
        return model.layers

    def update_merged_params_dict(self, merged_params_dict, new_merged_params, layer_idx):
        new = {f"layers.{layer_idx}.{name}": value for name, value in new_merged_params.items()}
        return {**merged_params_dict, **new}

    def layer_batches_forward(self, layer, batches_input):
        return [layer(batch) for batch in batches_input]

    def get_regmean_weights(self, model_name, layer, batches_input, linear_modules_to_merge):
        found, hooks = {}, []
        for name, linear in linear_modules_to_merge.items():
            def hook(module, arguments, output, name=name):
                found[name] = arguments[0].mT @ arguments[0] / len(arguments[0])
            hooks.append(linear.register_forward_hook(hook))
        layer(batches_input[0])
        for hook in hooks:
            hook.remove()
        return found


def run(algorithm):
    def merged(pool, settings):
        return algorithm(**settings).run(pool).state_dict()
    return merged


def masked(algorithm):
    def merged(pool, settings):
        masks = load_file(settings.pop("masks"))
        names = [name for name, _ in pool.load_pretrained_model().named_parameters()]
        drawn = iter([masks[f"{model}/{name}"] for model in pool.model_names for name in names])
        real, torch.rand_like = torch.rand_like, lambda parameter: next(drawn)
        try:
            return algorithm(**settings).run(pool).state_dict()
        finally:
            torch.rand_like = real
    return merged


def vectors(pool):
    base = pool.load_pretrained_model().state_dict()
    experts = [pool.load_model(name).state_dict() for name in pool.model_names]
    return base, [{key: expert[key] - base[key] for key in base} for expert in experts]


def emr(pool, settings):
    base = {key: value.clone() for key, value in pool.load_pretrained_model().state_dict().items()}
    unified = EMRMerging().run(pool).unified_task_vector.state_dict()
    return {key: base[key] + unified[key] for key in base}


def consensus(pool, settings):
    base, tasks = vectors(pool)
    flat, start = torch.stack([state_dict_to_vector(task) for task in tasks]), state_dict_to_vector(base)
    masks = tall.generate_task_masks(flat, flat + start, start, tall_mask_lambda=settings["tall_mask_lambda"])
    # The tensors of the dictionary that is given become parts of the vector.
    by_task = {name: vector_to_state_dict(mask, task) for name, mask, task in zip(pool.model_names, masks, tasks)}
    tall.load_tall_mask = lambda *_: by_task  # it would read files
    kept = tall.construct_consensus_mask(base, settings["prun_thre_k"], None)
    return vector_to_state_dict(start + kept * flat.sum(0) * settings["scaling_factor"], base)


def knots(pool, settings):
    base, tasks = vectors(pool)
    merged = {}
    for key, value in base.items():
        found = [task[key] for task in tasks]
        if value.ndim == 2:
            left, sizes, rights = subspace_alignment(found, eps=1e-9)
            flat = torch.stack([(sizes[:, None] * right).flatten() for right in rights])
            merged[key] = value + left @ ties_merging(flat, settings["threshold"], "mean").view(len(sizes), -1)
        else:
            merged[key] = value + sum(found) / len(found)
    return merged


def regmean(pool, settings):
    names = pool.model_names
    models, trainers = [pool.load_model(name) for name in names], [Trainer(pool.data[name]) for name in names]
    return regmean_merging(models, trainers, [], [len(pool.data[name]) for name in names], **settings)


METHODS = {
    "average": run(SimpleAverageAlgorithm),
    "task_arithmetic": run(TaskArithmeticAlgorithm),
    "slerp": run(SlerpMergeAlgorithm),
    "ties": run(TiesMergingAlgorithm),
    "dare": masked(DareTaskArithmetic),
    "dare_ties": masked(DareTiesMerging),
    "emr": emr,
    "consensus": consensus,
    "tsv_m": run(TaskSingularVectorMerging),
    "iso_c": run(ISO_C_Merge),
    "iso_cts": run(ISO_CTS_Merge),
    "opcm": run(OPCM),
    "knots": knots,
    "wudi": run(WUDIMerging),
    "regmean": regmean,
    "regmean_pp": run(LayerByLayer),
    "fisher": run(ExactFisher),
    "model_stock": run(ModelStock),
}


def opened(path, arguments):
    tensors = load_file(path)
    module = Net(**arguments).to(next(iter(tensors.values())).dtype)
    module.load_state_dict(tensors)
    return module


for job in json.loads(Path(sys.argv[1]).read_text()):
    torch.manual_seed(0)
    models = {name: opened(path, job["net"]) for name, path in job["models"].items()}
    pool = Pool(models)
    pool.data = {name: inputs(path) for name, path in job["data"].items()}
    found = METHODS[job["method"]](pool, job["settings"])
    save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, job["out"])
"""


@dataclass(frozen=True)
class Family:
    """Models to merge.

    Args:
        experts: How many.
        net: The arguments of ``Net``.
        step: The standard deviation of the task vectors.
        common: That of a part which all task vectors have in common.
        base: Whether they have a base.
    """

    experts: int = 3
    net: Mapping[str, Any] = field(default_factory=dict)
    step: float = 0.2
    common: float = 0.0
    base: bool = True

    @property
    def size(self) -> int:
        """The number of their parameters."""
        bias = self.net.get("bias", True)
        block = 2 * WIDTH * HIDDEN + 2 * WIDTH + bias * (WIDTH + HIDDEN)
        return self.net.get("blocks", 2) * block + CLASSES * (WIDTH + bias)


FAMILIES = {
    "three": Family(),
    "two": Family(experts=2, common=0.3),
    "two without a base": Family(experts=2, base=False),
    "six near the base": Family(experts=6, step=0.003),
    "no biases": Family(net={"bias": False}),
    "one layer": Family(net={"blocks": 0}),
}
TRIMMED = 0.2
"""The share that TIES keeps of `three`, as FusionBench has it: it keeps one entry more."""
TIES = (int(TRIMMED * FAMILIES["three"].size) + 1) / FAMILIES["three"].size


@dataclass(frozen=True)
class Case:
    """A merge as FusionBench and as Ecotone make it.

    Args:
        method: The function of the driver, and ``settings`` its arguments.
        settings: As FusionBench takes them.
        operator: Ours; by default of the same name. ``ours`` are its settings.
        ours: Fields of a recipe.
        at: The coefficients; None means the published merge.
        solve: The solver of the coefficients.
        family: The models.
        near: The tolerance, of ``NEAR``.
        dtypes: The types of the models.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    operator: str = ""
    ours: Mapping[str, Any] = field(default_factory=dict)
    at: float | None = None
    solve: str | None = None
    family: str = "three"
    near: str = "sums"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


NEAR = {
    "sums": {torch.float32: 4e-6, torch.float64: 5e-14},
    "matrices": {torch.float32: 2e-5, torch.float64: 2e-13},
    "solutions": {torch.float32: 1e-4, torch.float64: 1e-12},
    "angles": {torch.float32: 2e-6, torch.float64: 1e-6},  # it takes cosines in float32
    "descent": {torch.float64: 2e-4},
}
"""The largest differences, as shares of a tensor's largest change. Solutions are of ill-conditioned equations."""

CASES = {
    "average": Case("average", operator="linear"),
    "task arithmetic": Case("task_arithmetic", {"scaling_factor": 0.3}, at=0.3),
    # It would interpolate linearly from a cosine of 0.9995 on.
    "slerp": Case(
        "slerp", {"t": 0.4, "DOT_THRESHOLD": 1.0}, ours={"per": "tensor"}, at=0.4, family="two without a base"
    ),
    "ties": Case(
        "ties",
        {"scaling_factor": 1.0, "threshold": TRIMMED, "remove_keys": [], "merge_func": "mean"},
        ours={"density": TIES},
    ),
    "ties, a sum": Case(
        "ties",
        {"scaling_factor": 0.3, "threshold": TRIMMED, "remove_keys": [], "merge_func": "sum"},
        ours={"density": TIES, "combine": "sum"},
        at=0.3,
    ),
    "ties_vectors": Case(
        "ties",
        {"scaling_factor": 0.3, "threshold": TRIMMED, "remove_keys": [], "merge_func": "sum"},
        "ties_vectors",
        {"density": TIES},
        at=0.3,
    ),
    "dare": Case(
        "dare",
        {"scaling_factor": 0.4, "sparsity_ratio": 0.75, "only_on_linear_weights": False},
        ours={"density": 0.25, "mask_seed": 3},
        at=0.4,
    ),
    # Its TIES trims what DARE has dropped: nothing more at this threshold.
    "dare with ties": Case(
        "dare_ties",
        {
            "scaling_factor": 1.0,
            "sparsity_ratio": 0.5,
            "only_on_linear_weights": False,
            "rescale": True,
            "threshold": 1 - 0.5 / FAMILIES["three"].size,
            "remove_keys": [],
            "merge_func": "mean",
        },
        ours={"density": 0.5, "mask_seed": 3},
        at=1.0,
    ),
    "emr": Case("emr"),
    # By its functions of masks: its algorithm of TALL masks compares task vectors with the base's weights.
    "consensus": Case(
        "consensus",
        {"tall_mask_lambda": 0.4, "prun_thre_k": 2, "scaling_factor": 0.4},
        ours={"mask_lambda": 0.4, "agree": 2},
        at=0.4,
    ),
    "tsv_m": Case("tsv_m", near="matrices"),
    "iso_c": Case("iso_c", {"scaling_factor": 1.0}, near="matrices"),
    "iso_cts": Case(
        "iso_cts", {"scaling_factor": 1.0, "common_space_fraction": 0.6}, ours={"common": 0.6}, near="matrices"
    ),
    # Its norms are those of the whole model: one coefficient, see `opcm_scale`.
    "opcm": Case(
        "opcm",
        {"alpha": 0.5, "shuffle_order": False, "save_on_every_step": False},
        ours={"alpha": 0.5, "rescale": "none"},
        near="matrices",
    ),
    # A layer at a time. In layers of these shapes rounding keeps the one entry more.
    "knots": Case("knots", {"threshold": TRIMMED}, ours={"density": TRIMMED}, near="matrices"),
    # Its Adam begins at the sum and takes steps of 1e-5: after so many it is at the minimum, ours without a ridge.
    "wudi": Case(
        "wudi",
        {"iter_num": 6000},
        ours={"ridge": 1e-9, "others": "mean"},
        family="six near the base",
        near="descent",
        dtypes=(torch.float64,),
    ),
    # It averages biases, ours are part of the least squares; so these models have none.
    "regmean": Case("regmean", ours={"targets": "weights", "ridge": 0.0}, family="no biases", near="solutions"),
    "regmean, shrunk": Case(
        "regmean",
        {"reduce_non_diagonal_ratio": 0.5},
        ours={"targets": "weights", "ridge": 0.0, "shrink": 0.5},
        family="no biases",
        near="solutions",
    ),
    # It merges lists of blocks; the head stays the base's.
    "regmean_pp": Case(
        "regmean_pp",
        {
            "num_regmean_examples": ROWS,
            "exclude_param_names_regex": [],
            "reduce_non_diagonal_ratio": 1.0,
            "weight_transpose": True,
        },
        ours={"ridge": 0.0, "freeze": ["head*"]},
        family="no biases",
        near="solutions",
    ),
    # Its own weights square sums of slopes over classes and batches, so they are no Fisher information.
    "fisher": Case(
        "fisher",
        {
            "exclude_param_names_regex": [],
            "normalize_fisher_weight": False,
            "minimal_fisher_weight": 0.0,
            "num_fisher_examples": ROWS,
        },
        ours={"floor": 0.0},
    ),
    # It takes the norms over the whole model, which is one layer here.
    "fisher, normalised": Case(
        "fisher",
        {
            "exclude_param_names_regex": [],
            "normalize_fisher_weight": True,
            "minimal_fisher_weight": 0.0,
            "num_fisher_examples": ROWS,
        },
        ours={"floor": 0.0, "normalise": True},
        family="one layer",
    ),
    # Of more than two it averages angles, ours are the paper's cosines. It extrapolates from the base where cosines are
    # below 0; these are above.
    "model_stock": Case("model_stock", operator="task_arithmetic", solve="model_stock", family="two", near="angles"),
}
TRIED = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]


def made(family: Family, dtype: torch.dtype, folder: Path) -> None:
    """The models of a family, a recipe of them, and inputs of each task."""
    folder.mkdir(parents=True)
    (folder / "nets.py").write_text(NETS)
    draws = torch.Generator().manual_seed(7)
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    shapes = {name: value.shape for name, value in scope["Net"](**family.net).state_dict().items()}

    def noise(scale: float) -> dict[str, Tensor]:
        return {
            name: scale * torch.randn(shape, generator=draws, dtype=torch.float64) for name, shape in shapes.items()
        }

    base, common = noise(0.5), noise(family.common)
    names = [f"expert{number}" for number in range(family.experts)]
    models = {"base": base}
    for name in names:
        own = noise(family.step)
        models[name] = {key: base[key] + common[key] + own[key] for key in base}
    for name, tensors in models.items():
        save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / f"{name}.safetensors")
    for name in names:
        mix = torch.randn(WIDTH, WIDTH, generator=draws, dtype=torch.float64)
        rows = torch.randn(ROWS, WIDTH, generator=draws, dtype=torch.float64)
        save_file({"inputs": (rows @ mix).to(dtype)}, folder / f"{name}-inputs.safetensors")
    data = {name: str(folder / f"{name}-inputs.safetensors") for name in names}
    record = {
        "name": "merge",
        "models": {
            "base": "base.safetensors" if family.base else None,
            "experts": [f"{name}.safetensors" for name in names],
            "architecture": {"call": "./nets.py:Net", "arguments": dict(family.net)},
        },
        "merge": {"operator": "linear"},
        "objectives": {"search": []},
        "calibration": [
            {
                "name": name,
                "loss": "distillation",
                "hidden": 0.0,
                "data": {"call": "./nets.py:inputs", "arguments": {"path": path}},
            }
            for name, path in data.items()
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))


def masks(case: Case, folder: Path, to: Path) -> str:
    """A file of DARE's masks as we draw them: 1 where an entry is kept."""
    names = [f"expert{number}" for number in range(FAMILIES[case.family].experts)]
    paths = [folder / f"{name}.safetensors" for name in names]
    layout = Sources.open(paths, folder / "base.safetensors", "task_arithmetic").layout
    drawn = Masks(case.ours["mask_seed"], case.ours["density"])
    kept = drawn.apply([torch.ones(layout.size) for _ in names], 0)
    found = {
        f"{name}/{key}": value
        for name, flat in zip(names, kept, strict=True)
        for key, value in layout.views(flat).items()
    }
    save_file({key: value.clone() for key, value in found.items()}, to)
    return str(to)


def merged(case: Case, folder: Path, to: Path, at: float | None) -> dict[str, Tensor]:
    """The merge that `ecotone merge` exports."""
    settings = {f"merge.{key}": value for key, value in case.ours.items()}
    recipe = one_shot.of_recipe(
        folder / "recipe.yaml", settings, operator=case.operator or case.method, at=at, solve=case.solve
    )
    return load_file(one_shot.merge(recipe, to).path / "model.safetensors")


def opcm_scale(folder: Path, found: Mapping[str, Tensor]) -> float:
    """The coefficient that gives the merge ``found`` of the cleaned task vectors their mean norm, as OPCM has it."""

    def norm(tensors: Mapping[str, Tensor]) -> float:
        base = load_file(folder / "base.safetensors")
        return float(torch.cat([(tensors[key].double() - base[key].double()).flatten() for key in base]).norm())

    sizes = [norm(load_file(folder / f"expert{number}.safetensors")) for number in range(3)]
    return sum(sizes) / len(sizes) / norm(found)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[dict[str, Tensor], dict[str, Tensor], Path]]:
    """By case and type, what FusionBench made, what we export, and the folder of the models."""
    root = tmp_path_factory.mktemp("fusionbench")
    jobs, ours, places = [], {}, {}
    for number, (name, dtype) in enumerate(TRIED):
        case = CASES[name]
        family = FAMILIES[case.family]
        folder = root / f"{case.family}-{dtype}".replace(" ", "-")
        if not folder.exists():
            made(family, dtype, folder)
        experts = [f"expert{k}" for k in range(family.experts)]
        models = (["_pretrained_"] if family.base else []) + experts
        files = {model: folder / f"{'base' if model == '_pretrained_' else model}.safetensors" for model in models}
        settings = dict(case.settings)
        if "mask_seed" in case.ours:
            settings["masks"] = masks(case, folder, root / f"{number}-masks.safetensors")
        jobs.append(
            {
                "method": case.method,
                "settings": settings,
                "net": dict(family.net),
                "models": {model: str(path) for model, path in files.items()},
                "data": {expert: str(folder / f"{expert}-inputs.safetensors") for expert in experts},
                "out": str(root / f"{number}-theirs.safetensors"),
            }
        )
        found = merged(case, folder, root / f"{number}", case.at)
        if case.operator == "" and case.method == "opcm":
            found = merged(case, folder, root / f"{number}-scaled", opcm_scale(folder, found))
        ours[name, dtype], places[name, dtype] = found, folder
    (root / "jobs.json").write_text(json.dumps(jobs))
    drive(PROGRAM, DRIVER, root / "jobs.json", next(iter(places.values())), folder=root)
    return {key: (load_file(job["out"]), ours[key], places[key]) for key, job in zip(TRIED, jobs, strict=True)}


def gap(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference, as a share of the largest change of its tensor by our merge, and the tensor's name."""
    found = []
    for key, tensor in theirs.items():
        mine = ours[key].double()
        change = float((mine - base[key].double()).abs().max())
        found.append((float((tensor.double() - mine).abs().max()) / (change or 1.0), key))
    return max(found)


def labels(tried: Sequence[tuple[str, torch.dtype]]) -> list[str]:
    return [f"{name}, {dtype}".replace("torch.", "") for name, dtype in tried]


@pytest.mark.parametrize(("name", "dtype"), TRIED, ids=labels(TRIED))
def test_the_merge_is_ours(name: str, dtype: torch.dtype, pairs: Any) -> None:
    theirs, ours, folder = pairs[name, dtype]
    assert set(theirs) == set(ours)
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    worst, key = gap(theirs, ours, load_file(folder / "base.safetensors"))
    print(f"{name}, {dtype}: {key} differs most, by {worst:.1e} of its largest change")
    assert worst <= NEAR[CASES[name].near][dtype], f"{key}: {worst:.2e}"


@pytest.mark.parametrize(("name", "dtype"), TRIED, ids=labels(TRIED))
def test_no_other_method_would_pass(name: str, dtype: torch.dtype, pairs: Any) -> None:
    """The models tell all methods apart but those that are one merge."""
    theirs, _, folder = pairs[name, dtype]
    base = load_file(folder / "base.safetensors")
    for other, case in CASES.items():
        same = other == name or {other, name} == {"ties, a sum", "ties_vectors"}
        if case.family == CASES[name].family and dtype in case.dtypes and not same:
            assert gap(theirs, pairs[other, dtype][1], base)[0] > 0.05, other
