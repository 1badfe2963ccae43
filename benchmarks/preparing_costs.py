"""What preparing an operator's vectors costs, by formulas: operations of each stage, bytes at the peak, bytes on disk.

All is of a decoder of Llama's kind, whose blocks have seven linear layers. Operations count a multiplication and an
addition as two. Those of decompositions are LAPACK's usual counts for n columns and m rows (Golub & Van Loan,
"Matrix Computations", 4th edition): Cholesky n³ / 3, all eigenvalues 4 n³ / 3, with eigenvectors 9 n³, the thin
singular value decomposition 6 m n² + 20 n³ for m >= n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ecotone.fitness.preparing.blocks import TRIED
from ecotone.fitness.preparing.known import GROUP_BYTES
from ecotone.fitness.preparing.likeness import PIECE

DATA = ("regmean", "regmean_pp", "kfac", "fisher")
"""Operators that read data."""
DEPTH = ("regmean", "regmean_pp", "kfac")
"""Operators that prepare blocks in the order of depth."""
OPERATORS = (*DATA, "tsv_m", "iso_c", "wudi")
STAGES = ("passes", "moments", "slopes", "solves")
"""Forward passes; second moments of rows; passes with graphs and backward passes; what operators do with matrices."""
PARTS = ("module", "merged", "statistics", "hidden states", "work")
"""What holds memory."""
DOUBLE = 8
"""Bytes of a float64."""


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Args:
        hidden: Its hidden size.
        inner: The width inside its perceptrons.
        blocks: How many blocks it has.
        heads: Attention heads.
        groups: Heads of keys and values.
        vocabulary: Tokens.
        tied: Whether the output layer is the table of embeddings.
    """

    hidden: int
    inner: int
    blocks: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of a block's linear layers: query, key, value, output, gate, up and down."""
        width, narrow, inner = self.hidden, self.hidden * self.groups // self.heads, self.inner
        return (width, width), (narrow, width), (narrow, width), (width, width), *[(inner, width)] * 2, (width, inner)

    @property
    def in_block(self) -> int:
        """Weights of a block's linear layers."""
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def table(self) -> int:
        """Weights of the table of embeddings."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        norms = (2 * self.blocks + 1) * self.hidden
        return self.blocks * self.in_block + norms + self.table * (1 if self.tied else 2)


SMOLLM2 = Shape(576, 1536, 30, 9, 3, 49_152, tied=True)
LLAMA_7B = Shape(4096, 11_008, 32, 32, 32, 32_000, tied=False)


@dataclass(frozen=True)
class Job:
    """What is prepared.

    Args:
        operator: The operator, with its default settings.
        shape: The models.
        experts: K, how many experts there are.
        examples: Texts of each expert's task.
        length: Tokens of a text.
        batch: Texts in a pass.
        passes: Backward passes a batch.
        steps: Steps of conjugate gradients, in the mean over layers.
        element: Bytes of a weight.
    """

    operator: str
    shape: Shape
    experts: int = 2
    examples: int = 32
    length: int = 64
    batch: int = 8
    passes: int = 4
    steps: float = 20.0
    element: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of one expert's task."""
        return self.examples * self.length

    @property
    def kinds(self) -> tuple[str, ...]:
        """The statistics of each layer."""
        known = {"regmean": ("inputs", "outputs"), "kfac": ("inputs", "slopes"), "fisher": ("fisher",)}
        return known.get(self.operator, ("inputs",) if self.operator in DATA else ())

    @property
    def groups(self) -> int:
        """How often slopes are gathered: of as many blocks at a time as their statistics have room."""
        slopes = [kind for kind in self.kinds if kind in ("slopes", "fisher")]
        held = self.experts * block_bytes(self.shape, slopes)
        return -(-self.shape.blocks // max(1, GROUP_BYTES // held)) if held else 0


# -- operations ----------------------------------------------------------------------------------------------


def evaluation(job: Job) -> float:
    """A forward pass over the examples of all tasks."""
    return job.experts * job.tokens * forward(job.shape, job.length)


def forward(shape: Shape, length: int, blocks: float | None = None, head: bool = True) -> float:
    """A forward pass, by token.

    Args:
        shape: The model.
        length: Tokens of a text.
        blocks: How many blocks it goes through; None for all.
        head: Whether there are logits at its end.
    """
    attention = 4 * length * shape.hidden
    through = (shape.blocks if blocks is None else blocks) * (2 * shape.in_block + attention)
    return through + (2 * shape.table if head else 0)


def operations(job: Job) -> dict[str, float]:
    """Floating-point operations by stage."""
    found = dict.fromkeys(STAGES, 0.0)
    shape, every = job.shape, job.experts * job.tokens
    blocks = forward(shape, job.length, head=False)
    if job.operator in DEPTH:
        # The layers' order is found, data come to the first block, and each block is run with an expert's weights and
        # with the merged ones; own data come to the first block, too, and are run with the expert's weights.
        own = 1 if "outputs" in job.kinds else 0
        tried = job.experts * min(TRIED, job.examples) * job.length
        whole = forward(shape, job.length)
        found["passes"] = every * ((2 + own) * whole + (2 + own) * blocks) + (1 + own) * tried * (2 * whole + blocks)
    for rows, columns in shape.layers:
        found["moments"] += shape.blocks * every * moments(job, rows, columns)
        found["solves"] += shape.blocks * solve(job, rows, columns)
    if job.groups:
        found["slopes"] = every * (job.groups * forward(shape, job.length) + job.passes * backward(job))
    return found


def moments(job: Job, rows: int, columns: int) -> float:
    """Second moments of one row of data at a layer."""
    each = {
        "inputs": 2 * (columns + 1) ** 2,
        "outputs": 2 * (columns + 1) * rows,
        "slopes": 2 * job.passes * rows**2,
        "fisher": 2 * job.passes * rows * (columns + 1),
    }
    return sum(each[kind] for kind in job.kinds)


def backward(job: Job) -> float:
    """A backward pass to the outputs of each group's first layers, by token, for all groups."""
    size = job.shape.blocks / job.groups
    left = [job.shape.blocks - number * size for number in range(job.groups)]
    attention = 4 * job.length * job.shape.hidden  # whose products have two sides that take gradients
    return sum(forward(job.shape, job.length, blocks) + blocks * attention for blocks in left)


def solve(job: Job, m: int, n: int) -> float:
    """What the operator does with the matrices (m, n) of one layer."""
    count = job.experts
    both = 2 * m * n * (m + n)  # B X A
    if job.operator in ("regmean", "regmean_pp"):
        gram = 2 if job.operator == "regmean" else 1
        return 4 / 3 * n**3 + n**3 / 3 + count * (2 * gram + 2) * m * n**2
    if job.operator == "kfac":
        rotated = count * 4 * (m**3 + n**3) + 5 * count * both
        rounds = 3 * count**2 * both
        return 9 * (m**3 + n**3) + rotated + rounds + job.steps * count**2 * both
    if job.operator == "fisher":
        return 6 * count * m * n
    if job.operator == "tsv_m":
        least = min(m, n)
        sides = singular(m, least) + singular(n, least) + 2 * least**2 * (m + n)
        return count * singular(m, n) + sides + 2 * least * m * n
    if job.operator == "iso_c":
        return singular(m, n) + 4 * count * m * n * min(m, n)
    stacked = 2 * count * m * n**2 + 9 * n**3
    return stacked + count * (6 * m * n**2 + 4 * m * n * min(m, n))


def singular(m: int, n: int) -> float:
    """A thin singular value decomposition."""
    most, least = max(m, n), min(m, n)
    return 6 * most * least**2 + 20 * least**3


# -- bytes ---------------------------------------------------------------------------------------------------


def block_bytes(shape: Shape, kinds: Sequence[str]) -> int:
    """Statistics of one block of one expert, in float64."""
    return sum(layer_bytes(kinds, rows, columns) for rows, columns in shape.layers)


def layer_bytes(kinds: Sequence[str], rows: int, columns: int) -> int:
    """Statistics of one layer of one expert, in float64."""
    sizes = {"inputs": (columns + 1) ** 2, "slopes": rows**2}
    return DOUBLE * sum(sizes.get(kind, rows * (columns + 1)) for kind in kinds)


def peak(job: Job) -> dict[str, float]:
    """Bytes at the peak, by what holds them; models on disk are mapped and do not count."""
    shape = job.shape
    parts = dict.fromkeys(PARTS, 0.0)
    moments_of = [{**parts, "work": work_of_tables(job)}, {**parts, "work": work_of_layers(job)}]
    if job.operator in DATA:
        first, solving = moments_of
        model = float(job.element * shape.parameters)
        work = work_of_slopes(job) if job.groups else 0.0
        slopes = {**parts, "statistics": float(held(job, slopes=True)), "work": work}
        passes = {**parts, "work": work_of_passes(job)}
        solving["statistics"] = float(held(job, slopes=False) + held(job, slopes=True))
        moments_of += [passes, slopes]
        for moment in moments_of:
            moment["module"] = model
        if job.operator in DEPTH:
            paths = 2 if "outputs" in job.kinds else 1
            norms = 2 * shape.blocks * shape.hidden
            for moment in moments_of:
                table = shape.parameters - shape.blocks * shape.in_block if moment in (first, passes) else norms
                moment["merged"] = float(job.element * table)
                if moment is not first:
                    moment["hidden states"] = float(job.experts * paths * job.element * job.tokens * shape.hidden)
    return max(moments_of, key=lambda moment: sum(moment.values()))


def held(job: Job, *, slopes: bool) -> int:
    """Statistics that are held at a time: a block's; of slopes, or where nothing else is wanted, a group of blocks'."""
    kinds = [kind for kind in job.kinds if (kind in ("slopes", "fisher")) is slopes]
    blocks = -(-job.shape.blocks // job.groups) if slopes and job.groups else 1
    return job.experts * blocks * block_bytes(job.shape, kinds)


WORK = {
    "regmean": (4, 3),
    "regmean_pp": (4, 3),
    "kfac": (16, 4),
    "fisher": (6, 0),
    "tsv_m": (8, 2),
    "iso_c": (6, 2),
    "wudi": (8, 3),
}
"""By operator, matrices of a layer's shape and square ones, for K = 2, that are made at most at a time."""


def work_of_layers(job: Job) -> float:
    """The largest layer's matrices: the models' in float64, and what the operator makes of them."""
    shaped, square = WORK[job.operator]
    scale = job.experts / 2
    found = []
    for m, n in job.shape.layers:
        sides = n**2 + (m**2 if job.operator == "kfac" else 0)
        if job.operator in ("tsv_m", "iso_c"):
            sides = min(m, n) ** 2
        found.append(DOUBLE * ((job.experts + 1) * m * n + scale * (shaped * m * n + square * sides)))
    return max(found)


def work_of_passes(job: Job) -> float:
    """The logits of a batch, and what one block makes of it."""
    rows, shape = job.batch * job.length, job.shape
    return float(job.element * rows * (shape.vocabulary + 8 * shape.hidden + 3 * shape.inner))


def work_of_slopes(job: Job) -> float:
    """A batch's logits, slopes at them and signs; activations of its graph; inputs, zeros and slopes by layer."""
    rows, shape = job.batch * job.length, job.shape
    logits = rows * shape.vocabulary * (2 * job.element + 1)
    blocks = -(-shape.blocks // job.groups)
    activations = shape.blocks * (16 * shape.hidden + 2 * shape.inner)
    by_layer = blocks * sum(3 * m + n for m, n in shape.layers)
    return float(logits + job.element * rows * (activations + by_layer))


def work_of_tables(job: Job) -> float:
    """A table of embeddings, which is prepared in pieces."""
    return float(DOUBLE * min(PIECE, job.shape.table) * (3 * job.experts + 1))


def basis_bytes(job: Job) -> int:
    """Bytes of the vectors on disk."""
    return job.experts * job.element * job.shape.parameters


# -- other sizes ---------------------------------------------------------------------------------------------


def scaled(seconds: Mapping[str, float], measured: Job, other: Job) -> dict[str, float]:
    """Seconds by stage of another job, at the speed that each stage had in the one that was measured."""
    found = {}
    before, after = operations(measured), operations(other)
    for stage, one in seconds.items():
        ratio = other.shape.parameters / measured.shape.parameters
        found[stage] = one * (after[stage] / before[stage] if before.get(stage) else ratio)
    return found
