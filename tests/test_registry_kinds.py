"""Parts chosen by name from a registry: what is taken, what is refused and in which words, and what the schema says."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from ecotone.experiments.plugins import registries
from ecotone.fitness.statistics.kinds import STATISTICS
from ecotone.merging.models.formats import FORMATS
from ecotone.merging.operators import OPERATORS
from ecotone.populations.errors import InputError
from ecotone.registry import Registry, package_of
from ecotone.search.registry import SEARCHES
from ecotone.settings import UNKNOWN_KIND, Call, Chosen, Part, check_kind, check_shape, chosen_of

HERE = "kinds_tested"


class Shape(Part):
    """A shape.

    Attributes:
        name: What it is called.
        kind: Its kind.
    """

    name: str
    kind: str
    corners: ClassVar[int]

    @abstractmethod
    def area(self) -> float:
        """Square metres."""


class Circle(Shape):
    """Round.

    Attributes:
        radius: Metres.
    """

    corners: ClassVar[int] = 0
    kind: Literal["circle", "disc"] = "circle"
    radius: float = Field(default=1.0, gt=0)

    @field_validator("radius")
    @classmethod
    def _is_small(cls, value: float) -> float:
        if value > 100:
            raise ValueError(f"expected at most 100, found {value}")
        return value

    def area(self) -> float:
        return 3.0 * self.radius**2


class Square(Shape):
    """Not round.

    Attributes:
        side: Metres.
        paint: What draws it.
    """

    corners: ClassVar[int] = 4
    kind: Literal["square"]
    side: float
    paint: Call | None = None

    def area(self) -> float:
        return self.side**2


def check(name: str, kind: Any) -> None:
    check_kind(name, kind, Shape, "kind")


SHAPES: Registry[type[Shape]] = Registry(
    "shape",
    "ecotone.tested_shapes",
    {"circle": f"{__name__}:Circle", "disc": f"{__name__}:Circle", "square": f"{__name__}:Square"},
    check,
)


class Drawing(Part):
    """Shapes.

    Attributes:
        first: One.
        others: More.
        last: One, or none.
    """

    first: Annotated[Shape, Chosen(SHAPES, "kind", default="circle")]
    others: tuple[Annotated[Shape, Chosen(SHAPES, "kind")], ...] = ()
    last: Annotated[Shape, Chosen(SHAPES, "kind")] | None = None


def told(record: dict[str, Any]) -> list[tuple[tuple[Any, ...], str, str]]:
    """Location, type and message of each error."""
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate(record)
    return [(error["loc"], error["type"], error["msg"]) for error in caught.value.errors()]


CIRCLE = {"name": "a", "kind": "circle", "radius": 2.0}
SQUARE = {"name": "b", "kind": "square", "side": 3.0, "paint": {"call": "m:f"}}


# -- what is taken -------------------------------------------------------------------------------------------


def test_a_mapping_becomes_the_kind_that_it_names() -> None:
    found = Drawing.model_validate({"first": CIRCLE, "others": [SQUARE, {**CIRCLE, "kind": "disc"}], "last": SQUARE})
    assert [type(one) for one in (found.first, *found.others, found.last)] == [Circle, Square, Circle, Square]
    assert found.first.area() == 12.0
    assert found.others[0] == Square(name="b", kind="square", side=3.0, paint=Call(call="m:f"))


def test_an_instance_is_taken_as_it_is() -> None:
    circle = Circle(name="a", radius=2.0)
    assert Drawing(first=circle, others=(circle,)).first is circle


def test_without_a_tag_the_default_is_meant_where_there_is_one() -> None:
    assert Drawing.model_validate({"first": {"name": "a"}}).first == Circle(name="a", kind="circle")
    [(place, kind, message)] = told({"first": CIRCLE, "others": [{"name": "a"}]})
    assert (place, kind) == (("others", 0, "kind"), UNKNOWN_KIND)
    assert message == "expected one of circle, disc, square, found None."


def test_a_part_goes_to_json_and_back() -> None:
    first = Drawing.model_validate({"first": CIRCLE, "others": [SQUARE], "last": CIRCLE})
    dumped = first.model_dump(mode="json")
    paint = {"call": "m:f", "arguments": {}}
    assert dumped == {"first": CIRCLE, "others": [{**SQUARE, "paint": paint}], "last": CIRCLE}
    assert list(dumped["others"][0]) == ["name", "kind", "side", "paint"]
    assert Drawing.model_validate(dumped) == first
    assert Drawing.model_validate_json(first.model_dump_json()) == first
    assert first.model_dump(exclude={"others": {0: {"paint"}}})["others"] == (
        {"name": "b", "kind": "square", "side": 3.0},
    )


def test_a_part_is_pickled_by_its_class() -> None:
    first = Drawing.model_validate({"first": CIRCLE, "others": [SQUARE]})
    assert pickle.loads(pickle.dumps(first)) == first
    assert type(pickle.loads(pickle.dumps(first)).others[0]) is Square


def test_texts_at_any_depth_are_located() -> None:
    square = Square(
        name="b", kind="square", side=3.0, paint=Call(call="m:f", arguments={"a": ["x:1", {"b": "x:2"}], "n": 3})
    )
    found = square.located(lambda text: text.replace("x:", "/x/"))
    assert found.paint is not None
    assert found.paint.arguments == {"a": ["/x/1", {"b": "/x/2"}], "n": 3}
    assert (found.name, found.side) == ("b", 3.0)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sqare", "expected one of circle, disc, square, found 'sqare'. Did you mean 'square'?"),
        (
            "zz",
            "expected one of circle, disc, square, found 'zz'. If another package has it, install that package. "
            "`ecotone plugins` lists all kinds.",
        ),
        ("", "expected one of circle, disc, square, found ''."),
        (3, "expected one of circle, disc, square, found 3."),
        (["circle"], "expected one of circle, disc, square, found ['circle']."),
    ],
)
def test_an_unknown_kind_lists_the_known_ones(given: Any, message: str) -> None:
    assert told({"first": CIRCLE, "others": [CIRCLE, {"kind": given}]}) == [
        (("others", 1, "kind"), UNKNOWN_KIND, message)
    ]
    assert told({"first": CIRCLE, "last": {"kind": given}})[0][1:] == (UNKNOWN_KIND, message)


def test_errors_lie_below_the_name_of_the_kind_all_at_once() -> None:
    wrong = {"name": 3, "kind": "disc", "radius": 0.0}
    found = told({"first": wrong, "others": [SQUARE, {"kind": "square", "sid": 1.0, "paint": {}, "name": "c"}]})
    assert [(place, kind) for place, kind, _ in found] == [
        (("first", "disc", "name"), "string_type"),
        (("first", "disc", "radius"), "greater_than"),
        (("others", 1, "square", "side"), "missing"),
        (("others", 1, "square", "paint", "call"), "missing"),
        (("others", 1, "square", "sid"), "extra_forbidden"),
    ]
    [(place, kind, message)] = told({"first": {**CIRCLE, "radius": 101.0}})
    assert (place, kind) == (("first", "circle", "radius"), "value_error")
    assert message == "Value error, expected at most 100, found 101.0"


@pytest.mark.parametrize("given", [3, "circle", None, ["circle"]])
def test_what_is_no_mapping_is_refused(given: Any) -> None:
    assert told({"first": given}) == [(("first",), "no_settings", "Expected a mapping of settings")]


def test_an_instance_of_another_class_is_refused() -> None:
    class Hexagon(Shape):
        """Of a package that is not installed."""

        corners: ClassVar[int] = 6
        kind: Literal["hexagon", "circle"]

        def area(self) -> float:
            return 0.0

    [(place, kind, message)] = told({"first": Hexagon(name="h", kind="hexagon")})
    assert (place, kind) == (("first", "kind"), UNKNOWN_KIND)
    assert "found 'hexagon'" in message
    [(place, kind, _)] = told({"first": Hexagon(name="h", kind="circle")})
    assert (place, kind) == (("first", "circle"), "model_type")


# -- kinds of other packages ---------------------------------------------------------------------------------


class Triangle(Shape):
    """Pointed.

    Attributes:
        height: Metres.
    """

    corners: ClassVar[int] = 3
    kind: Literal["triangle"]
    height: float = 1.0

    def area(self) -> float:
        return self.height


def test_a_registered_kind_is_taken_and_may_be_forgotten() -> None:
    SHAPES.register("triangle", Triangle)
    try:
        found = Drawing.model_validate({"first": {"name": "t", "kind": "triangle", "height": 2}}).first
        assert found == Triangle(name="t", kind="triangle", height=2.0)
        assert [place for place, *_ in told({"first": {"name": "t", "kind": "triangle", "hight": 2}})] == [
            ("first", "triangle", "hight")
        ]
        mapping = Drawing.model_json_schema()["properties"]["first"]["discriminator"]["mapping"]
        assert mapping["triangle"] == "#/$defs/Triangle"
    finally:
        SHAPES.forget("triangle")
    [(_, _, message)] = told({"first": {"name": "t", "kind": "triangle"}})
    assert message.startswith("expected one of circle, disc, square, found 'triangle'.")


PLUGIN = """
from typing import Annotated, ClassVar, Literal
from ecotone.settings import Chosen
from {tested} import SHAPES, Shape

class Star(Shape):
    '''Pointed.

    Attributes:
        points: How many.
    '''

    corners: ClassVar[int] = 10
    kind: Literal["star"]
    points: int = 5

    def area(self):
        return 1.0

class Nested(Star):
    '''Holds another shape.

    Attributes:
        inner: The other one.
    '''

    kind: Literal["nested"]
    inner: Annotated[Shape, Chosen(SHAPES, "kind")] | None = None

class Fussy(Star):
    kind: Literal["fussy"]

    @classmethod
    def texts(cls):
        raise OSError("no ink")

class Silent(Star):
    kind: Literal["silent"]
    depth: int = 1
"""

USER = """
import json, pickle, sys
sys.path[:0] = [{tests!r}]
import {tested} as tested
from pydantic import ValidationError
from ecotone.populations.errors import EcotoneError

def said(kind):
    try:
        return repr(tested.Drawing.model_validate({{"first": {{"name": "s", "kind": kind}}}}).first)
    except ValidationError as error:
        return [list(one["loc"]) + [one["msg"]] for one in error.errors()]

found = {{kind: said(kind) for kind in {kinds!r}}}
star = tested.Drawing.model_validate({{"first": {{"name": "s", "kind": "star"}}}})
found["pickled"] = pickle.loads(pickle.dumps(star)) == star
found["schema"] = sorted(tested.Drawing.model_json_schema()["properties"]["first"]["discriminator"]["mapping"])
print(json.dumps(found))
"""


def installed(folder: Path, name: str, points: dict[str, str]) -> None:
    """A distribution of that name with entry points, as an installer leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[ecotone.tested_shapes]\n{lines}")


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process says that has packages with kinds, good and bad ones."""
    folder = tmp_path_factory.mktemp("site")
    tested = Path(__file__).stem
    (folder / "starry.py").write_text(PLUGIN.format(tested=tested))
    (folder / "broken_shape.py").write_text("raise RuntimeError('no display\\nat all')\n")
    (folder / "based_shape.py").write_text("class Odd(BaseException): pass\nraise Odd('odd')\n")
    points = {
        "star": "starry:Star",
        "silent": "starry:Silent",
        "broken": "broken_shape:Broken",
        "str": "starry:Literal",
        "nested": "starry:Nested",
        "fussy": "starry:Fussy",
        "based": "based_shape:Shape",
        "bare": "starry",
        "odd": "no place!",
    }
    installed(folder, "starry", {**points, "twice": "starry:Star"})
    installed(folder, "other", {"twice": "starry:Silent"})
    program = USER.format(tests=str(Path(__file__).parent), tested=tested, kinds=(*points, "twice"))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{folder}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kind_of_another_package_is_taken_like_ours(plugged: dict[str, Any]) -> None:
    assert plugged["star"] == "Star(name='s', kind='star', points=5)"
    assert plugged["pickled"] is True


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "broken",
            "the shape 'broken' of the package starry 1.0 cannot be imported: RuntimeError: no display "
            "(broken_shape:Broken). Mend or uninstall that package.",
        ),
        (
            "silent",
            "the shape 'silent' of the package starry 1.0 cannot be used: Silent: expected a text for each field, "
            "found none for depth. Write it into the Attributes section of the class's docstring.",
        ),
        (
            "based",
            "the shape 'based' of the package starry 1.0 cannot be imported: Odd: odd (based_shape:Shape). Mend or "
            "uninstall that package.",
        ),
        (
            "nested",
            "the shape 'nested' of the package starry 1.0 cannot be used: Nested: expected fields of types that have a "
            "JSON Schema, found none: RecursionError: maximum recursion depth exceeded",
        ),
        ("fussy", "the shape 'fussy' of the package starry 1.0 cannot be used: OSError: no ink. Mend or uninstall"),
        (
            "bare",
            "the shape 'bare' of the package starry 1.0 cannot be imported: expected an entry point of the form "
            "module:attribute, found 'starry'. Mend or uninstall that package.",
        ),
        (
            "odd",
            "the shape 'odd' of the package starry 1.0 cannot be imported: expected an entry point of the form mod",
        ),
        ("str", "the shape 'str' of the package starry 1.0 cannot be used: expected a class made of Shape, found "),
    ],
)
def test_a_broken_kind_is_refused_and_its_package_is_named(plugged: dict[str, Any], kind: str, message: str) -> None:
    [[*place, said]] = plugged[kind]
    assert place == ["first", "kind"]
    assert said.startswith(message)


def test_two_packages_with_a_kind_of_one_name_are_refused_both_named(plugged: dict[str, Any]) -> None:
    [[*place, said]] = plugged["twice"]
    assert place == ["first", "kind"]
    assert said.startswith("two installed packages have a shape 'twice': ")
    assert "starry 1.0 (starry:Star)" in said
    assert "other 1.0 (starry:Silent)" in said


def test_the_schema_has_the_kinds_that_can_be_used(plugged: dict[str, Any]) -> None:
    assert plugged["schema"] == ["circle", "disc", "square", "star"]


class Faulty(Triangle):
    """Half declared.

    Attributes:
        kind: Its kind.
        extra: A field.
    """

    kind: Literal["faulty"]


@pytest.mark.parametrize(
    ("extra", "default", "said"),
    [
        (Callable[[int], int], abs, "expected fields of types that have a JSON Schema, found none: PydanticInvalidF"),
        ("Undefined", 3, "expected fields of types that have a JSON Schema, found none: PydanticUndefine"),
        (int, Field(default_factory=lambda: 1 // 0), "extra: its default cannot be made: ZeroDivisionError: integer"),
    ],
)
def test_fields_that_would_break_the_schema_are_refused(extra: Any, default: Any, said: str) -> None:
    members = {"__annotations__": {"extra": extra}, "extra": default, "__module__": __name__}
    kind = type("Broken", (Faulty,), members)
    with pytest.raises(InputError) as refused:
        SHAPES.register("faulty", kind)
    assert refused.value.message.startswith(f"Broken: {said}")
    assert "faulty" not in SHAPES


def test_an_instance_is_not_registered() -> None:
    with pytest.raises(InputError) as refused:
        SHAPES.register("triangle", Triangle(name="t", kind="triangle"))  # type: ignore[arg-type]
    said = "expected a class made of Shape, found an instance of Triangle. Register the class Triangle."
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("registry", "instance"),
    [
        (OPERATORS, lambda: OPERATORS.get("ties", "operator")()),
        (STATISTICS, lambda: STATISTICS.get("magnitude", "kind")({})),
        (FORMATS, lambda: FORMATS.get("lora", "format")()),
        (SEARCHES, lambda: SEARCHES.get("random", "search")()),
    ],
)
def test_an_instance_of_ours_is_not_registered(registry: Registry[Any], instance: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=r"expected a (class|frozen dataclass).*, found (an instance of|<)"):
        registry.register("mine", instance())
    assert "mine" not in registry


def test_the_package_of_a_kind_is_that_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "packed", {"one": "packed_shapes.inner:One", "odd": "no place!"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_of(type("One", (), {"__module__": "packed_shapes.other"})) == "packed 1.0"
    assert package_of(Triangle) == package_of(Circle) == package_of(Registry) == ""


@pytest.mark.parametrize("registry", registries().values(), ids=registries())
def test_the_schemas_and_defaults_of_ours_can_be_made(registry: Registry[Any]) -> None:
    for name in registry:
        kind = registry.get(name, "kind")
        settings = getattr(kind, "settings", kind)
        if isinstance(settings, type) and issubclass(settings, Part):
            check_shape(settings)


# -- the JSON Schema -----------------------------------------------------------------------------------------


def test_the_schema_is_one_of_all_kinds_each_once() -> None:
    schema = Drawing.model_json_schema()
    first, others = schema["properties"]["first"], schema["properties"]["others"]["items"]
    refs = {"circle": "#/$defs/Circle", "disc": "#/$defs/Circle", "square": "#/$defs/Square"}
    assert first["oneOf"] == [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}]
    assert first["discriminator"] == others["discriminator"] == {"propertyName": "kind", "mapping": refs}
    assert first["description"] == "One."
    circle = schema["$defs"]["Circle"]
    assert circle["description"] == "Round."
    assert circle["properties"]["radius"] == {
        "default": 1.0,
        "description": "Metres.",
        "exclusiveMinimum": 0,
        "title": "Radius",
        "type": "number",
    }
    assert circle["properties"]["name"]["description"] == "What it is called."
    assert schema["$defs"]["Square"]["properties"]["paint"]["anyOf"][0] == {"$ref": "#/$defs/Call"}
    assert "Call" in schema["$defs"]


def test_a_type_on_its_own_has_a_schema_too() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[Shape, Chosen(SHAPES, "kind")])
    assert set(adapter.json_schema()["$defs"]) == {"Circle", "Square", "Call"}
    assert adapter.validate_python(CIRCLE) == Circle(name="a", radius=2.0)


@pytest.mark.parametrize("name", ["first", "others", "last"])
def test_the_registry_of_a_field_can_be_found(name: str) -> None:
    found = chosen_of(Drawing.model_fields[name])
    assert found is not None
    assert (found.registry, found.tag) == (SHAPES, "kind")
    assert chosen_of(Square.model_fields["paint"]) is None


# -- half-declared kinds -------------------------------------------------------------------------------------


class Untagged(Circle):
    """A circle by another name."""


class Lacking(Shape):
    """Neither corners nor an area."""

    kind: Literal["lacking"]


class Textless(Circle):
    """Nobody knows how deep."""

    kind: Literal["textless"]
    depth: int = 1


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a", 3, "expected a class made of Shape, found int."),
        ("a", Call, "expected a class made of Shape, found Call."),
        ("untagged", Untagged, "kind: expected a Literal that holds 'untagged', found 'circle', 'disc'."),
        ("shape", Shape, "kind: expected a Literal that holds 'shape', found none."),
        ("lacking", Lacking, "Lacking lacks area, corners. Shape says what each is."),
        ("textless", Textless, "Textless: expected a text for each field, found none for depth."),
    ],
)
def test_a_half_declared_kind_is_refused_when_it_is_registered(name: str, kind: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        SHAPES.register(name, kind)
    assert str(caught.value).startswith(message)
    assert name not in SHAPES
