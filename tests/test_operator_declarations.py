"""What operators declare: settings with types, texts and bounds, told once; and what is refused when one is lacking."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from ecotone.experiments.merge import Merge
from ecotone.merging import operators
from ecotone.merging.operators import OPERATORS
from ecotone.merging.operators.declared import Setting, check_declared, settings_of
from ecotone.merging.operators.linear import Linear
from ecotone.merging.operators.task_arithmetic import TaskArithmetic
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome


@dataclass(frozen=True)
class Damped(Linear):
    """Sums with damped coefficients.

    Args:
        damping: What coefficients are divided by.
        powers: Exponents of the layers.
        kind: How it is damped.
        plain: Whether nothing is done.
    """

    damping: Annotated[float, Field(ge=1, lt=8)] = 2.0
    powers: tuple[int, ...] = field(default_factory=tuple)
    kind: Literal["weak", "strong", "none"] = "weak"
    plain: bool = False

    name = "damped"
    searchable: ClassVar = {"damping": (1.0, 8.0)}

    def weights(self, coefficients, grams=None):
        return super().weights(coefficients) / self.damping


@pytest.fixture
def damped():
    OPERATORS.register("damped", Damped)
    yield
    OPERATORS.forget("damped")


@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_setting_of_ours_is_told_and_typed(name):
    for setting in operators.settings_of(name).values():
        assert setting.text.endswith(".")
        assert setting.expected
        assert setting.checked(setting.default) == setting.default
        assert "default" not in setting.adapter.json_schema()
        if setting.bounds is not None:
            low, high = setting.bounds
            assert low < high


def test_settings_are_those_of_the_fields(damped):
    found = operators.settings_of("damped")
    assert list(found) == ["damping", "powers", "kind", "plain"]
    told = "What coefficients are divided by."
    assert found["damping"] == Setting("damping", found["damping"].type, 2.0, told, (1.0, 8.0))
    assert (found["powers"].default, found["powers"].bounds) == ((), None)
    assert found["damping"].adapter.json_schema() == {"type": "number", "minimum": 1, "exclusiveMaximum": 8}
    assert [setting.expected for setting in found.values()] == [
        "a number at least 1 and below 8",
        "",
        "weak, strong or none",
        "true or false",
    ]
    assert operators.settings_of("dare")["mask_seed"].bounds == (0, 2**32 - 1)
    assert dict(operators.settings_of("linear")) == {}


def test_settings_of_a_recipe_are_checked_by_their_types(damped):
    assert operators.checked("damped", {"damping": 3, "powers": [1, 2]}) == {"damping": 3.0, "powers": (1, 2)}
    assert operators.checked("ties", {}) == {}
    for name, given, said in (
        ("damped", {"damping": 8}, "merge.damping: expected a number at least 1 and below 8, found 8. What coeff"),
        ("damped", {"damping": float("inf")}, "merge.damping: expected a number at least 1"),
        ("damped", {"kind": "mild"}, "merge.kind: expected weak, strong or none, found 'mild'. How it is damped."),
        ("damped", {"powers": ["a"]}, "merge.powers: input should be a valid integer"),
        ("damped", {"dampng": 2}, "merge.dampng: the operator 'damped' has no such setting. Did you mean 'damping'?"),
        ("ties", {"density": 1.5}, "merge.density: expected a number above 0 and at most 1, found 1.5."),
        ("dare", {"mask_seed": 2**32}, "merge.mask_seed: expected an integer from 0 to 4294967295, found 4294967296."),
        ("linear", {"density": 0.5}, "merge.density: the operator 'linear' has no such setting. It takes none."),
        ("tie", {}, "merge.operator: expected one of linear, slerp, task_arithmetic, ties"),
    ):
        with pytest.raises(InputError) as refused:
            operators.checked(name, given)
        assert str(refused.value).startswith(said)


def test_an_operator_that_checks_nothing_itself_is_checked(damped, tmp_path):
    for given in ({"damping": "3"}, {"damping": True}, {"damping": 0.5}, {"kind": None}, {"plain": 1}):
        with pytest.raises(InputError, match=r"expected .*, found"):
            operators.get("damped", given)
    operator = operators.get("damped", {"damping": 4.0})
    assert operators.tuned(operator, {"damping": 5.0}).damping == 5.0
    with pytest.raises(InputError, match="damping: expected a number at least 1 and below 8, found 9"):
        operators.tuned(operator, {"damping": 9.0})
    with pytest.raises(InputError, match="has no parameter 'kind'"):
        operators.tuned(operator, {"kind": "weak"})


def test_an_operator_of_this_process_merges(damped, tmp_path):
    import torch
    from safetensors.torch import save_file

    for name in "ab":
        save_file({"w": torch.tensor([2.0, 4.0])}, tmp_path / f"{name}.safetensors")
    sources = Sources.open([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], operator="damped")
    genomes = [Genome.uniform(2, [1.0, 1.0]), Genome.uniform(2, [1.0, 1.0], damping=4.0)]
    assert sources.stack(genomes)["w"].tolist() == [[2.0, 4.0], [1.0, 2.0]]


def declared(*bases, **members):
    return dataclass(frozen=True)(type("Half", bases, {"__doc__": "Half of one.", **members}))


TOLD = "Half.\n\nArgs:\n    share: A share.\n"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (lambda: "half", "expected a frozen dataclass, found 'half'"),
        (lambda: type("Half", (), {}), "expected a frozen dataclass, found <class"),
        (lambda: dataclass(type("Half", (), {})), "expected a frozen dataclass"),
        (lambda: declared(), "found no name, needs_base, changes, affine, geometry, searchable, columns, seeds, wei"),
        (lambda: declared(TaskArithmetic), "expected one of this name, found 'task_arithmetic'"),
        (
            lambda: declared(Linear, name="half", __annotations__={"share": float}),
            "expected a default of its setting 'share', found none",
        ),
        (
            lambda: declared(Linear, name="half", share=0.5, __annotations__={"share": float}),
            "expected a text of its setting 'share' in the Args section of its docstring, found none",
        ),
        (
            lambda: declared(Linear, name="half", share="x", __doc__=TOLD, __annotations__={"share": float}),
            "expected a default that fits its type, found share: expected a number, found 'x'",
        ),
        (
            lambda: declared(Linear, name="half", share=None, __doc__=TOLD, __annotations__={"share": Linear | None}),
            "",
        ),
        (
            lambda: declared(Linear, name="half", share=None, __doc__=TOLD, __annotations__={"share": memoryview}),
            "that pydantic can check and that has a JSON Schema, found <class 'memoryview'>",
        ),
        (lambda: declared(Linear, name="half", searchable={"shar": (0, 1)}), "searchable settings among its fields"),
        (lambda: declared(Linear, name="half", searchable=["share"]), "of settings to (low, high), found ['share']"),
        (lambda: declared(Linear, name="half", searchable=None), "of settings to (low, high), found None"),
        (
            lambda: declared(Linear, name="half", searchable={"share": (1, 0)}),
            "searchable: two numbers (low, high) with low below high for 'share', found (1, 0)",
        ),
        (
            lambda: declared(Linear, name="half", searchable={"share": 1.0}),
            "searchable: two numbers (low, high) with low below high for 'share', found 1.0",
        ),
        (
            lambda: declared(Linear, name="half", share=1, __doc__=TOLD, __annotations__={"share": "Unknown"}),
            "annotations and defaults that can be read, found NameError: name 'Unknown' is not defined",
        ),
        (
            lambda: declared(
                Linear,
                name="half",
                share=field(default_factory=lambda: 1 / 0),
                __doc__=TOLD,
                __annotations__={"share": float},
            ),
            "annotations and defaults that can be read, found ZeroDivisionError: division by zero",
        ),
        (
            lambda: declared(
                Linear, name="half", share=abs, __doc__=TOLD, __annotations__={"share": Callable[[int], int]}
            ),
            "a type of its setting 'share' that pydantic can check and that has a JSON Schema, found collections.abc",
        ),
    ],
)
def test_what_is_half_declared_is_refused_in_words(kind, said):
    if not said:
        check_declared("half", kind())
        return
    with pytest.raises(InputError) as refused:
        OPERATORS.register("half", kind())
    assert refused.value.message.startswith("operator 'half': expected ")
    assert said in refused.value.message
    assert "half" not in OPERATORS


@pytest.mark.parametrize("key", list(Merge.model_fields))
def test_settings_with_the_names_of_keys_of_merge_are_refused(key):
    doc = f"Half.\n\nArgs:\n    {key}: A share.\n"
    with pytest.raises(InputError) as refused:
        OPERATORS.register(
            "half", declared(Linear, name="half", __doc__=doc, __annotations__={key: float}, **{key: 1.0})
        )
    assert f"other names than the keys of merge (operator, dtype, rank), found {key}." in refused.value.message


def test_settings_of_a_class_are_found_once():
    kind = OPERATORS.get("ties", "operator")
    assert settings_of(kind) is settings_of(kind)
