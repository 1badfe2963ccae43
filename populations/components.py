"""Components: the roles that tensors have in a model, told by their names.

A merge may take one set of coefficients for all attention tensors, one for all feed-forward tensors, and so on. The
names of checkpoints tell the role: ``TABLE`` has a pattern for each. Names are enough: the authors of all families name
the parts of a layer alike. So a search's variables do not depend on a module, which plain checkpoints do not have, or
on the version of the library that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

Component: TypeAlias = Literal[
    "attention",
    "mlp",
    "experts",
    "router",
    "norms",
    "embeddings",
    "head",
    "vision",
    "projector",
    "mixer",
    "other",
]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""In the order in which a search has their coefficients.

``attention`` and ``mlp`` (feed-forward) of every layer; ``experts`` of a mixture, shared ones among them, and their
``router``; ``norms``, and the scales of residual branches; ``embeddings`` of tokens, positions, patches and frames; the
``head``, with poolers and classifiers; ``vision``, a vision or audio tower beside a language model, whole; the
``projector`` between the two; ``mixer``: state spaces, recurrences and convolutions, which mix positions otherwise than
by attention; and ``other``, what fits none.
"""

TOWER = re.compile(
    r"(^|\.)(vision(_tower|_model|_encoder|_backbone)?|visual|image_(encoder|tower)|audio_(tower|model|encoder)|"
    r"(speech|sound)_encoder)\."
)
"""A tower beside a language model."""

_PATTERNS: tuple[tuple[Component, str], ...] = (
    (
        "projector",
        r"""(^|\.)(multi_?modal_projector | mm_projector | \w*connector | aligner | \w*resampler | perceiver
        | qformer | embed_(vision|audio) | (text|visual|vision|language)_projection | modality_projection
        | audio_adapter | visual\.merger | deepstack_merger_list)(\.|$)""",
    ),
    (
        "norms",  # wherever they are: in attention, in a head, in an embedding
        r"""(norm | layrnorm | normalization | (^|[._])(ln|bn)(_?\d+|_[a-z]+)?)(\.\d+)*
        (\.(weight|bias|gamma|beta|scale|running_mean|running_var|num_batches_tracked))?$
        | (^|[._])(norm|layer_norm|layernorm)_?\w*(\.\d+)*(\.(weight|bias|scale))?$
        | (^|\.)(lambda_?\d | layer_scale\w* | layer_scalar | ls\d | gamma(_\d)?)(\.(lambda1|gamma|weight))?$""",
    ),
    ("other", r"(^|\.)\w*(altup | laurel | hyper_connection)\w*(\.|$)"),  # residual streams of their own
    (
        "embeddings",
        r"""rotary | inv_freq | ^(\w+\.)?(embedder|embeddings|feature_extractor)\. | \.pos_conv_embed\.
        | (^|\.)downsampl\w+\.""",
    ),
    (
        "router",
        r"""(^|\.)(router | \w*moe_gate | shared_expert_gate | moe_statics | expert_bias)(\.|$)
        | e_score_correction | \.gate\.wg\.""",
    ),
    ("experts", r"(^|\.)(\w*experts? | expert_\d+ | \w*moe\.(in|out)put_linear)(\.|$)"),
    (
        "head",
        r"""^(\w+\.)?(lm_head | head | embed_out | classifier | score | cls | proj_out | qa_outputs | \w+_head
        | pooler | \w*predictions | vocab_\w+ | lm_loss | output_projection | final_logits_bias)(\.|$)
        | ^(decoder|output|fc)\.(weight|bias)$""",
    ),
    (
        "mixer",
        r"""(^|\.)(linear_attn | mamba\w* | ssm | [ms]lstm_layer | conv | conv_module | dwconv | convolution
        | mixer | temporal_block)(\.|$)""",
    ),
    ("attention", r"(^|\.)\w*(attn|attention)\w*(\.|$)"),
    (
        "embeddings",
        r"""(^|\.)(\w*embed\w* | \w*emb | wte | wpe | shared | \w+_tokens? | token_type\w* | \w*position\w*
        | pos_\w+ | patch_\w+ | feature_extractor | feature_projection | subsampling | encoder\.conv\d
        | per_layer_\w+)(\.|$)""",
    ),
    (
        "mlp",
        r"""(^|\.)(\w*mlps?\w* | \w*ffns?\d?(_\w+)? | \w*feed_?forward\w* | ff | fc_?(\d|in|out) | lin(ear)?\d
        | densereludense | intermediate | output | dense_\w+ | pwconv\d | w[io](_\d)? | w\d
        | (up|down|gate|gate_up)_proj)(\.|$)""",
    ),
    ("mixer", r"(^|\.)conv\d\w*(\.|$)"),
)

TABLE: tuple[tuple[Component, re.Pattern[str]], ...] = tuple(
    (component, re.compile(pattern, re.VERBOSE)) for component, pattern in _PATTERNS
)
"""The components, and patterns of the names of their tensors, in lower case. The first that is found counts."""

_OTHER: Component = "other"
_LAYERS = ("attention", "mlp", "experts", "mixer")
_MIXER = r"(mixer|temporal_block)"  # stands in some families for whatever a layer holds


def components(names: Sequence[str]) -> tuple[Component, ...]:
    """The component of each tensor of a model.

    A tower counts as ``vision`` where there is a language model beside it; the tensors of an image model by itself have
    the roles of any other's. A tensor ``gate`` is a router's where its neighbours are experts.

    Args:
        names: The names of all tensors of the model, as the checkpoint has them.
    """
    context = _Neighbours.of(names)
    found = [context.component(name) for name in names]
    tower = [one != "projector" and TOWER.search(name) is not None for name, one in zip(names, found, strict=True)]
    beside = any(one in _LAYERS and not within for one, within in zip(found, tower, strict=True))
    return tuple("vision" if within and beside else one for one, within in zip(found, tower, strict=True))


@dataclass(frozen=True)
class _Neighbours:
    """What a tensor's name does not tell without those beside it.

    Args:
        mixtures: Modules that hold experts, and those that hold a router.
        attending: Modules called mixers that are attention: they have a projection of queries.
        forward: Modules called mixers that are feed-forward.
    """

    mixtures: frozenset[str]
    attending: frozenset[str]
    forward: frozenset[str]

    @classmethod
    def of(cls, names: Sequence[str]) -> _Neighbours:
        """Of the tensors of a model."""

        def before(pattern: str) -> frozenset[str]:
            return frozenset(name[: found.end(1)] for name in names if (found := re.search(pattern, name)))

        return cls(
            before(r"(^.*?)\.(experts?[._]|router\.)"),
            before(rf"(^.*?{_MIXER})\.(q_proj|qkv_proj|Wqkv)\."),
            before(rf"(^.*?{_MIXER})\.up_proj\."),
        )

    def component(self, name: str) -> Component:
        """The component of one tensor, towers aside."""
        parent, _, last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if parent in self.mixtures and last in ("gate", "input_linear", "output_linear"):
            return "router" if last == "gate" else "experts"
        told = _told(re.sub(r"\d+", "0", name.lower()))
        if told == "mixer" and parent in self.attending:
            return "attention"
        return "mlp" if told == "mixer" and parent in self.forward else told


@lru_cache(maxsize=4096)
def _told(name: str) -> Component:
    """The component of the first pattern that is found in a name in lower case, whose numbers do not count."""
    return next((component for component, pattern in TABLE if pattern.search(name)), _OTHER)
