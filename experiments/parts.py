"""Parts of a recipe: what all have in common, Python functions, and objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from ecotone.settings import Arguments, Call, Part

# -- objectives of any model ---------------------------------------------------------------------------------


class Accuracy(Part):
    """The share of examples whose highest output is the label; ``data`` returns ``(inputs, labels)``.

    Attributes:
        data: Inputs are a tensor or an array (N, ...), or a mapping of such, as Hugging Face models take.
        head: Returns the task's classification head where the merged model is only the encoder: a callable from
            (outputs, inputs) to logits. It is never merged.
        batch: Examples in one forward pass.
    """

    name: str
    type: Literal["accuracy"] = "accuracy"
    direction: Literal["maximize"] = "maximize"
    data: Call
    head: Call | None = None
    batch: int | None = Field(default=None, ge=1, description="examples a forward pass; None lets Ecotone choose")


class Entropy(Part):
    """Mean entropy of a classifier's predictions, in nats; it needs no labels.

    Attributes:
        data: Returns the inputs, or (inputs, labels), as in ``accuracy``.
        head: As in ``accuracy``.
        batch: Examples in one forward pass.
    """

    name: str
    type: Literal["entropy"]
    direction: Literal["minimize"] = "minimize"
    data: Call
    head: Call | None = None
    batch: int | None = Field(default=None, ge=1, description="examples a forward pass; None lets Ecotone choose")


class PythonObjective(Part):
    """A function of the merged model that returns a number, or a number and per-example scores.

    An argument that begins with ``prepared:`` is a path, relative to what the preparation step wrote.
    """

    name: str
    type: Literal["call"]
    direction: Literal["maximize", "minimize"] = "maximize"
    call: str = Field(description="package.module:function")
    arguments: Arguments = Field(default_factory=dict)


# -- objectives of language models ---------------------------------------------------------------------------


class LanguageObjective(Part):
    """What objectives of causal language models have in common; models.tokenizer turns their texts into tokens."""

    name: str
    type: str
    direction: Literal["maximize", "minimize"]

    @property
    def settings(self) -> dict[str, Any]:
        """All but name, type and direction, as the module in ``fitness`` takes them."""
        return self.model_dump(exclude={"name", "type", "direction"})


class LmEval(LanguageObjective):
    """A task of lm-eval, scored as its ``simple_evaluate`` would (``ecotone.fitness.lm_eval``).

    Attributes:
        task: Its name: one of lm-eval's own, or one in ``folder``.
        folder: A folder of task files (YAML); relative paths are from the recipe's folder.
        metric: Such as ``acc`` or ``exact_match``; None is the task's first.
        filter: What answers pass through before they are scored; None is the task's first.
        shots: Examples shown before each question; None is the task's own number.
        chat_template: Put requests into the tokenizer's chat template.
        fewshot_as_multiturn: In a chat template, make each shown example a turn of its own.
        system_instruction: Text that goes before everything else.
        batch: Rows in one forward pass; None is the largest that fits.
        limit: Documents in the calibration subset; None takes all.
        seed: Of that subset.
        part: With a limit, ``search`` is the subset and ``rest`` all other documents.
        max_length: Longest input in tokens; None is the model's.
        allow_code: Let the folder's files run Python of their own.
    """

    type: Literal["lm_eval"]
    direction: Literal["maximize", "minimize"] = "maximize"
    task: str
    folder: str | None = None
    metric: str | None = None
    filter: str | None = None
    shots: int | None = Field(default=None, ge=0)
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    batch: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    part: Literal["search", "rest", "all"] = "search"
    max_length: int | None = Field(default=None, ge=1)
    allow_code: bool = False


class TextObjective(LanguageObjective):
    """What objectives on files have in common.

    Attributes:
        data: A file or several, UTF-8; relative paths are from the recipe's folder, or ``prepared:``. A ``.jsonl``
            file has a record a line.
        part: With ``search`` and ``held_out``, the records are divided between them by the seed.
        seed: Of that division.
        share: Share of the records that ``search`` gets.
        limit: The most records of the part.
        batch: Rows in one forward pass; None lets Ecotone choose.
        bos: Whether the start token comes first; None: where the tokenizer has one.
    """

    data: str | tuple[str, ...]
    part: Literal["search", "held_out", "all"] = "all"
    seed: int = Field(default=0, ge=0)
    share: float = Field(default=0.5, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    bos: bool | None = None


class Reading(TextObjective):
    """What objectives have in common for which a model reads texts (``ecotone.fitness.language.perplexity``).

    Attributes:
        context: Tokens in a window; None is 1024, or what the model can take if that is less.
        stride: Tokens from a window's start to the next one's; None is ``context``.
        field: The field of a ``.jsonl`` file's lines that holds the text.
    """

    context: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    field: str = "text"


class Perplexity(Reading):
    """Bits per byte, or perplexity, of texts."""

    type: Literal["bits_per_byte", "perplexity"]
    direction: Literal["minimize"] = "minimize"


class Likelihood(Reading):
    """The geometric mean of a byte's probability, 2 to the minus bits per byte: what M2N2 can share out."""

    type: Literal["likelihood"]
    direction: Literal["maximize"] = "maximize"


class MultipleChoice(TextObjective):
    """The share of questions whose right choice is the likeliest (``ecotone.fitness.language.choices``).

    Attributes:
        template: The question, ``{name}`` for a field of the record.
        choices: The field that holds the choices.
        answer: The field that holds the number of the right one, from 0.
        delimiter: Text between a question and a choice.
        normalise: What a log-likelihood is divided by: ``none``, the choice's UTF-8 ``bytes``, or its ``tokens``.
        shots: Solved questions put before each: the first of ``examples``.
        examples: The file of these; None is ``data``, whose first records are then not scored.
        separator: Text between solved questions.
        reuse: Read a question once for all its choices: the same scores in less time.
    """

    type: Literal["multiple_choice"]
    direction: Literal["maximize"] = "maximize"
    template: str = "Question: {question}\nAnswer:"
    choices: str = "choices"
    answer: str = "answer"
    delimiter: str = " "
    normalise: Literal["none", "bytes", "tokens"] = "none"
    shots: int = Field(default=0, ge=0)
    examples: str | None = None
    separator: str = "\n\n"
    reuse: bool = True


class Generation(TextObjective):
    """What objectives have in common for which the model writes, greedily (``ecotone.fitness.language.generation``).

    Objectives with the same prompts and settings are scored on the same text, which is written once.

    Attributes:
        template: The prompt, ``{name}`` for a field of the record.
        chat: Put the prompt into the tokenizer's chat template.
        most: The most tokens to write.
        stop: Texts that end an answer.
    """

    template: str = "{prompt}"
    chat: bool = False
    most: int = Field(default=256, ge=1)
    stop: str | tuple[str, ...] = ()


class TokensGenerated(Generation):
    """The mean number of tokens a model writes for a prompt: fewer is better."""

    type: Literal["tokens_generated"]
    direction: Literal["minimize"] = "minimize"


class ExactMatch(Generation):
    """The share of prompts that the model answers right.

    Attributes:
        answer: The field that holds the right answer: a text, a number, or a list of those that count.
        extract: A regular expression; the answer is its last match in what was written. None: all that was written.
    """

    type: Literal["exact_match"]
    direction: Literal["maximize"] = "maximize"
    answer: str = "answer"
    extract: str | None = None


Language: TypeAlias = LmEval | Perplexity | Likelihood | MultipleChoice | TokensGenerated | ExactMatch
Objective: TypeAlias = Annotated[Accuracy | Entropy | PythonObjective | Language, Field(discriminator="type")]
OBJECTIVES: dict[str, type[Part]] = {
    "accuracy": Accuracy,
    "entropy": Entropy,
    "call": PythonObjective,
    "lm_eval": LmEval,
    "bits_per_byte": Perplexity,
    "likelihood": Likelihood,
    "perplexity": Perplexity,
    "multiple_choice": MultipleChoice,
    "tokens_generated": TokensGenerated,
    "exact_match": ExactMatch,
}
"""By type."""
