"""Hostile files, and texts of strangers: refused in words, bounded, and printed without acting on a terminal."""

from __future__ import annotations

import io
import json
import os
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors
import torch
from rich.table import Table
from safetensors.torch import save_file

from ecotone.experiments import storage, stored
from ecotone.experiments.consoles import PlainConsole
from ecotone.experiments.exports import _score_lines, read_record
from ecotone.experiments.logs import in_words
from ecotone.experiments.pages import _safe
from ecotone.experiments.printing import echo, markdown
from ecotone.experiments.tracking.notes import noted, statuses
from ecotone.fitness.language.texts import records
from ecotone.merging.models import hub
from ecotone.merging.models.checkpoint import INDEX, Checkpoint, read_header
from ecotone.merging.models.lora_reader import settings_of
from ecotone.merging.sources import Sources
from ecotone.populations import facts
from ecotone.populations.arrays import numbers, packed_numbers
from ecotone.populations.errors import CheckpointError, InputError, JournalError, first_line, shown, told
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.parsing import (
    LARGEST,
    MalformedError,
    explained,
    file_bytes,
    foreign_or_none,
    json_object,
    json_value,
    text_of,
    unpacked,
)
from ecotone.populations.yaml_texts import YamlError, document, load

MERGE = "merge both in one list"
OTHERWISE = "put it in quotes, or write the number in decimals"
EVIL = "\x1b]8;;http://evil\x07"
SLOW_RECIPES = ("300,000 values", "a million digits in base 60")


# -- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TAKEN_HEADERS", "STRICTER", "REFUSED_HEADERS"])
def test_headers_are_taken_and_refused_as_the_format_says(tmp_path: Path, kind: str) -> None:
    """The library ``safetensors`` is the judge; six rules are stricter."""
    for name, content in getattr(hostile, kind).items():
        found = hostile.outcome(hostile.read_header, content, tmp_path / "a.safetensors")
        assert (name, found) == (name, "accepted" if kind == "TAKEN_HEADERS" else "refused")
        try:
            safetensors.deserialize(content)
            taken = True
        except Exception:
            taken = False
        assert (name, taken) == (name, kind != "REFUSED_HEADERS")


def test_there_are_enough_hostile_files() -> None:
    assert len(hostile.STRICTER) + len(hostile.REFUSED_HEADERS) >= 48
    assert len(hostile.REFUSED_RECIPES) >= 40


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a hole", "bytes 4 to 8 of the data, before tensor 't1', are no tensor's"),
        ("overlapping", "tensors 't0' and 't1' overlap"),
        ("bytes behind the data", "1 bytes follow the last tensor"),
        ("a tensor twice", r"expected every key once, found 'a' twice"),
        ("a name with a terminal's link", r"that can be printed, found '\\\\x1b\]8;;http://evil"),
        ("a shape of 10^30", r"a shape of fewer than 2\*\*63 elements"),
        ("a field 100,000 deep", "objects and lists in each other"),
    ],
)
def test_an_error_says_what_is_wrong_with_a_header(tmp_path: Path, name: str, said: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(hostile.HEADERS[name])
    with pytest.raises(CheckpointError, match=said):
        read_header(file)


def test_a_header_beyond_the_format_s_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as handle:
        handle.write((100_000_001).to_bytes(8, "little"))
        handle.truncate(200_000_000)  # takes no disk
    with pytest.raises(CheckpointError, match="should take 100000001 bytes and the format allows 100000000"):
        read_header(file)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="expected a safetensors file, found a pipe"):
        read_header(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(MalformedError, match="expected a file, found a pipe"):
        file_bytes(tmp_path / "config.json")


def test_entries_out_of_order_give_the_right_numbers(tmp_path: Path) -> None:
    header = {
        "late": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "early": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    content = np.array([1, 2, 3], "<f4").tobytes()
    (tmp_path / "a.safetensors").write_bytes(hostile.file_of(json.dumps(header).encode() + b"  ", content))
    opened = Checkpoint.open(tmp_path / "a.safetensors")
    assert list(opened.tensors) == ["late", "early"]
    assert opened.tensor("late").tolist() == [2, 3]
    assert opened.tensor("early").tolist() == [1]


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "a" * 5000, "\0", "", ".", "a\x1b[31m", "a\nerror: fake"]
)
def test_files_of_an_index_lie_beside_it(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert "\nerror" not in str(caught.value)


def test_a_branch_of_the_hub_s_cache_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--mine"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    for text in (b"../../..", b"\xff\xfe", b"/", b"abc/..", b"x" * 5000):
        (folder / "refs" / "main").write_bytes(text)
        assert hub.snapshot(folder) == folder / "snapshots" / "abc"


# -- recipes ---------------------------------------------------------------------------------------------------------


def _check_recipes(file: Path, names: list[str]) -> None:
    for name in names:
        found = hostile.outcome(hostile.read_recipe, hostile.RECIPES[name], file)
        assert (name, found) == (name, "accepted" if name in hostile.TAKEN_RECIPES else "refused")


def test_recipes_are_taken_or_refused_in_words(tmp_path: Path) -> None:
    _check_recipes(tmp_path / "recipe.yaml", [name for name in hostile.RECIPES if name not in SLOW_RECIPES])


@pytest.mark.slow
def test_large_recipes_are_refused(tmp_path: Path) -> None:
    _check_recipes(tmp_path / "recipe.yaml", list(SLOW_RECIPES))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{c: 1, d: 2, c: 3}", "line 1, column 14: 'c' is given twice, first in line 1, column 2; keep one of them"),
        ("a:\n b: 1\n b: 2", "line 3, column 2: 'b' is given twice, first in line 2, column 2; keep one of them"),
        (
            "{<<: {}, <<: {}}",
            f"line 1, column 10: '<<' is given twice, first in line 1, column 2; {MERGE}",
        ),
        ("&a [b, *a]", "line 1, column 8: the anchor 'a' contains itself"),
        ("a: 010", f"line 1, column 4: YAML reads 010 as the number 8; {OTHERWISE}"),
        ("- 12:30", f"line 1, column 3: YAML reads 12:30 as the number 750; {OTHERWISE}"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected one document, found a second one"),
        ("{on: 1}", "line 1, column 2: expected text as keys of mappings, found on; put it in quotes"),
        ("a: \x07", "line 1, column 4: expected text, found the character U+0007; is it a binary file?"),
        ("a: !x b", "line 1, column 4: expected no tag, found !x; put the value in quotes if it is text"),
    ],
)
def test_an_error_of_yaml_says_where(text: str, said: str) -> None:
    with pytest.raises(YamlError) as caught:
        load(text)
    assert str(caught.value) == said


def test_what_yaml_gives_is_what_it_gave_before() -> None:
    import yaml

    for text in (
        "a: [1, 0x1f, 1_000, 1.5, .5, 1e3, 1.0e+3, yes, ~, , x]".replace(", ,", ","),
        "x: &x {k: 1, l: [2]}\ny: {<<: *x, k: 3}\nz: [*x, *x]",
        "a: |\n  text\n  more\nb: >\n  folded\n  text\nc: 'it''s'\nd: \"\\u00e9\\n\"",
        "? a\n: b\n",
        "",
    ):
        assert load(text) == yaml.safe_load(text)


def test_values_without_quotes_are_kept_as_they_were_written() -> None:
    found = document("name: no\nlist: [1_0, {x: ~}]\ntext: y")
    assert {steps: (one.text, one.line, one.column) for steps, one in found.scalars.items()} == {
        ("name",): ("no", 1, 7),
        ("list", 0): ("1_0", 2, 8),
        ("list", 1, "x"): ("~", 2, 17),
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: toy", "name: no", "YAML reads no without quotes as true or false: write it in quotes to mean text."),
        ("name: toy", "name: 1.50", "YAML reads 1.50 without quotes as the number 1.5: write '1.50' to mean text."),
        ("evaluations: 10", "evaluations: on", "YAML reads on without quotes as true or false: write it as a number."),
        ("evaluations: 10", "evaluations: 1e3", "YAML 1.1 reads 1e3 as text: write 1000.0, or 1000 for a whole"),
        ("evaluations: 10", "evaluations: 0o17", "YAML 1.1 reads 0o17 as text: write 15."),
        ("direction: maximize", "direction: yes", "YAML reads yes without quotes as true or false"),
    ],
)
def test_a_hint_says_what_to_write(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(hostile.PLAIN.replace(old, new))
    with pytest.raises(InputError) as caught:
        hostile.read_recipe(tmp_path / "recipe.yaml")
    assert said in str(caught.value)


# -- the parser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "a": 2}', "expected every key once, found 'a' twice"),
        (b'{"a": {"b": 1, "b": 2}}', "expected every key once, found 'b' twice"),
        (b"[NaN]", "expected finite numbers, found NaN"),
        (b"[-Infinity]", "expected finite numbers, found -Infinity"),
        (b"1e999", "expected numbers that a double can hold, found 1e999"),
        (b"9" * 5000, "expected JSON with numbers of a usual length"),
        (b"[" * 101 + b"]" * 101, "expected at most 100 objects and lists in each other"),
        (b"[" * 100_000, "expected at most 100 objects and lists in each other"),
        (b'"\\ud800"', "expected text, found half a pair of surrogates"),
        (b"\xff", "expected text in UTF-8, found the byte 0xff in line 1"),
        ("x".encode("utf-16"), "found text in UTF-16 or UTF-32"),
        (b"", "expected JSON, found none"),
        (b"{", "expected JSON, found none"),
    ],
)
def test_json_that_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(MalformedError, match=said):
        json_value(text)


def test_json_of_other_programs_is_read_as_they_do(tmp_path: Path) -> None:
    assert json_value(b'{"a": 1, "a": [Infinity]}', once=False, finite=False) == {"a": [float("inf")]}
    assert json_value(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert json_value(b"[" * 100 + b"]" * 100)
    (tmp_path / "config.json").write_text("[1]")
    assert foreign_or_none(tmp_path / "config.json") == {}
    assert foreign_or_none(tmp_path / "none.json") == {}
    with pytest.raises(MalformedError, match="expected a JSON object, found a list"):
        json_object("[1]")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(MalformedError, match="expected at most 64 MiB, found more"):
        file_bytes(tmp_path / "large.json")
    assert text_of(b"\xef\xbb\xbfa") == "a"


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zlib.compress(bytes(10_000_000), 9)
    assert len(bomb) < 20_000
    with pytest.raises(MalformedError, match="expected at most 1000 unpacked bytes, found more"):
        unpacked(bomb, 1000)
    with pytest.raises(MalformedError, match="expected at most 40 unpacked bytes"):
        packed_numbers(bomb, "<f4", 10)
    packed = zlib.compress(b"abcd")
    assert unpacked(packed, 4) == b"abcd"
    for damaged in (packed[:-1], b"", b"x", packed + b"y", packed[:5] + b"\xff" + packed[6:]):
        with pytest.raises(MalformedError):
            unpacked(damaged, 4)
    with pytest.raises(MalformedError):
        unpacked(packed, -1)  # zlib itself would take it for no limit


@pytest.mark.parametrize("kind", ["O", "object", "V8", "U4", "f8,f4", "S0", "m8", "x", "", "((", "<f8" * 500])
def test_arrays_are_of_numbers(kind: str) -> None:
    with pytest.raises(MalformedError, match="expected a type of numbers"):
        numbers(bytes(8), kind)


def test_arrays_have_their_size() -> None:
    assert numbers(np.arange(3.0).tobytes(), "<f8", 3).tolist() == [0, 1, 2]
    assert numbers(b"", "<f4", 0).size == 0
    for data, size in ((bytes(7), None), (bytes(16), 3)):
        with pytest.raises(MalformedError):
            numbers(data, "<f8", size)
    assert packed_numbers(zlib.compress(np.arange(3.0).tobytes()), "<f8", 3).tolist() == [0, 1, 2]


def test_errors_of_decoding_are_explained() -> None:
    def broken(error: Exception) -> Any:
        raise error

    for error in (
        ValueError("x"),
        KeyError("x"),
        TypeError(),
        OverflowError(),
        RecursionError(),
        zlib.error(),
        OSError(5, "x"),
    ):
        said = pytest.raises(JournalError, match=r"^the journal's goals: .*\. Ask\.$")
        with said, explained("the journal's goals", "Ask.", JournalError):
            broken(error)
    with pytest.raises(CheckpointError, match="kept"), explained("x"):
        raise CheckpointError("kept")


GENOME = {"boundaries": [0, 4], "coefficients": [[0.5, 0.5]], "parameters": {"density": 0.5}}


@pytest.mark.parametrize(
    "changes",
    [
        {"boundaries": [0, 4.5]},
        {"boundaries": ["0", "4"]},
        {"boundaries": [0, 10**30]},
        {"boundaries": [False, True]},
        {"boundaries": None},
        {"boundaries": {}},
        {"coefficients": [["0.5", "0.5"]]},
        {"coefficients": [[0.5], [0.5, 0.5]]},
        {"coefficients": [[None, 0.5]]},
        {"parameters": [["density", 0.5]]},
        {"parameters": {"density": [0.5]}},
        {"parameters": {"density": float("nan")}},
        {"residual": "AAAA"},
        {"residual": 5},
        {"boundaries": [0, -4], "residual": "AAAA"},
        {"boundaries": [0, 2**62], "residual": "AAAA"},
    ],
)
def test_a_genome_is_of_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="genome: expected JSON written by"):
        Genome.from_json(json.dumps(GENOME | changes))


def test_a_genome_s_text_has_each_key_once() -> None:
    assert Genome.from_json(json.dumps(GENOME)).digest == Genome.uniform(4, [0.5, 0.5], density=0.5).digest
    for text in (
        json.dumps(GENOME)[:-1] + ', "boundaries": [0, 5]}',
        "[" * 5000,
    ):
        with pytest.raises(InputError, match="genome: expected JSON written by"):
            Genome.from_json(text)
    with pytest.raises(InputError, match="coefficients: expected finite numbers"):
        Genome.from_json(json.dumps(GENOME).replace("0.5", "NaN", 1))
    with pytest.raises(MalformedError):
        facts.RECIPE.read('{"a": 1, "a": 2}')
    with pytest.raises(MalformedError):
        facts.GOALS.read("[" * 5000)


def test_a_line_of_data_is_told_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n' + b"[" * 100_000)
    with pytest.raises(InputError, match=r"data\.jsonl:3: expected a JSON object \(expected at most 100"):
        records([file], "here")


# -- small records ---------------------------------------------------------------------------------------------------


def test_fields_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    entry = {"object": "journal-1.sqlite", "bytes": 1, "hash": "x"}
    manifest = {"files": {"journal.sqlite": entry}, "counts": [1, 2, 3], "home": "x", "other": 5}
    assert storage._parsed(json.dumps(manifest).encode()) == manifest
    for name, value in (
        ("files", {"journal.sqlite": entry | {"object": "../../x"}}),
        ("files", {"journal.sqlite": entry | {"bytes": -1}}),
        ("counts", [1, 2]),
        ("home", ["x"]),
        ("lasts", 1e300),
        ("lasts", "long"),
        ("renewed", 1e300),
        ("released", "no"),
        ("url", {"a": 1}),
    ):
        assert name not in storage._parsed(json.dumps(manifest | {name: value}).encode())
    assert storage._parsed(b'{"lasts": NaN}') == storage._parsed(b"[" * 5000) == storage._parsed(b'{"a":1,"a":2}') == {}
    assert not stored.is_count(True)
    notes = {"mlflow": {"mirrored": "all", "run_id": "x", "complete": 1}, "../../x": {"run_id": "y"}}
    (tmp_path / "tracking.json").write_text(json.dumps(notes))
    assert noted(tmp_path, "mlflow") == {"run_id": "x"}
    assert list(statuses(tmp_path)) == ["mlflow"]


# -- text of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain größe 重み \u00a0 \U0001f600", "plain größe 重み \u00a0 \U0001f600"),
        (EVIL, "\\x1b]8;;http://evil\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u202eb\u2066\u200b\ufeff\u00ad", "a\\u202eb\\u2066\\u200b\\ufeff\\xad"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\ud800\U000e0041", "\\ud800\\U000e0041"),
    ],
)
def test_what_acts_on_a_terminal_is_printed_as_its_escape(text: str, printed: str) -> None:
    assert shown(text) == printed
    assert shown(printed) == printed
    assert InputError(text.replace("\r\n", "").replace("\t", "")).message == printed.replace("\\r\\n", "").replace(
        "\\t", ""
    )


def test_a_long_text_loses_its_middle() -> None:
    assert (
        shown("a" * 500 + "b" * 5000 + "c" * 500, 100)
        == "a" * 67 + " [... cut: 5,900 of 6,000 characters ...] " + "c" * 33
    )
    assert len(str(InputError("a" * 10_000_000))) < 110_000
    assert told(ValueError(EVIL + "x" * 5000 + "\nmore")).startswith("ValueError: \\x1b]8;;http://evil\\x07x")
    assert len(first_line(ValueError("x" * 5_000_000))) < 2100


def test_lines_of_an_error_stay_lines() -> None:
    assert InputError("a\nb\x1b[31m", "c\x07").message == "a\nb\\x1b[31m"
    assert str(InputError("a", "c\x07")) == "a c\\x07"


def test_tables_logs_pages_and_cards_show_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    written = io.StringIO()
    console = PlainConsole(file=written, force_terminal=True, color_system="standard", width=120, highlight=False)
    table = Table()
    table.add_column("x")
    table.add_row(EVIL, style="bold")
    console.print(table)
    console.print(f"{EVIL} text")
    printed = written.getvalue()
    assert printed.count("\\x1b]8;;http:") == 2
    assert "\x1b]8" not in printed
    assert "\x1b[1m" in printed  # its own bold stays
    echo(EVIL, err=True)
    assert capsys.readouterr().err == "\\x1b]8;;http://evil\\x07\n"
    event = {"time": "2024-01-01T00:00:00Z", "level": "info", "message": EVIL}
    assert in_words(json.dumps(event)).endswith("info: \\x1b]8;;http://evil\\x07")
    assert in_words(EVIL) == "\\x1b]8;;http://evil\\x07"
    assert _safe(f"<b>{EVIL}") == "&lt;b&gt;\\x1b]8;;http://evil\\x07"
    assert markdown("a|b`<i>[x](y)\n*") == "a&#124;b&#96;&#60;i&#62;&#91;x&#93;(y)\\n&#42;".replace("\\", "&#92;")
    lines = _score_lines(SimpleNamespace(scores={"a | b": 1.0}, held_out=None))
    assert lines[2].count("|") == 4


def test_a_model_s_name_can_be_printed(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31m\nerror: b"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert Checkpoint.open(folder).name == "a\\x1b[31m\\nerror: b"


def test_no_command_to_copy_holds_a_stranger_s_code(tmp_path: Path) -> None:
    evil = "x'); import os; os.system('true')#"
    (tmp_path / f"{evil}.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="If you trust it, convert it to safetensors") as caught:
        Checkpoint.open(tmp_path / f"{evil}.bin")
    assert "python -c" not in str(caught.value)
    (tmp_path / "a.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="python -c"):
        Checkpoint.open(tmp_path / "a.bin")
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, folder / "model.safetensors")
    for name, told_so in (("LlamaForCausalLM", True), (evil, False), (5, False)):
        config = {"architectures": [name], "quantization_config": {"quant_method": "fp8"}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="quantised") as caught:
            Sources.open([folder, folder])
        assert ("python -c" in str(caught.value)) == told_so


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("include: 5", "include: expected the name of a file, found 5"),
        ("include: none.yaml", "No such file"),
        ("a: !mine b", "could not determine a constructor for the tag '!mine'"),
        ("- a", "expected a mapping, found list"),
        (hostile.REFUSED_RECIPES["a billion laughs"].decode(), "found more with its aliases written out"),
        ("\0", "is it a binary file"),
    ],
)
def test_a_task_s_file_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    from ecotone.fitness.lm_eval import _refuse_code

    (tmp_path / "task.yaml").write_text(text)
    with pytest.raises(InputError, match=f"here: task: .*task.yaml or a file that it includes: .*{said}"):
        _refuse_code(SimpleNamespace(yaml_path=tmp_path / "task.yaml"), "here")


def test_settings_of_an_adapter_are_checked(tmp_path: Path) -> None:
    for field, value, said in (
        ("alpha_pattern", True, "numbers by simple regular expressions, found True"),
        ("rank_pattern", {"(a+)+$": 2}, "numbers by simple regular expressions"),
        ("rank_pattern", {"(": 2}, "numbers by simple regular expressions"),
        ("lora_alpha", 10**400, "a number"),
        ("target_parameters", [5], "a list of names"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, field: value}))
        with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {field}: expected {said}"):
            settings_of(tmp_path)
    patterns = {r".*\.q_proj": 4, "^model.layers.[0-9]+.fc$": 8, "layers.0.(q|k)_proj": 1.5}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "alpha_pattern": patterns}))
    assert settings_of(tmp_path)["alpha_pattern"] == patterns


RECORD = {"recipe": {}, "scores": {"search": {"f": 0.5}, "held_out": None}}


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": []},
        {"scores": {"search": -1, "held_out": None}},
        {"scores": {"held_out": None}},
        {"scores": {"search": {"f": "x"}, "held_out": None}},
        {"versions": None},
        {"fingerprints": {"a": 0}},
        {"fingerprints": {"a": {"b": 10**40}}},
        {"fingerprints": {"a": {"b": {"xxh3_128": -1}}}},
        {"recipe": 3},
    ],
)
def test_records_of_exports_of_another_shape_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ecotone.json").write_text(json.dumps(RECORD))
    assert read_record(tmp_path) == RECORD
    (tmp_path / "ecotone.json").write_text(json.dumps(RECORD | wrong))
    with pytest.raises(CheckpointError, match="the record of the export: "):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (facts.CONTENTS, '{"a": "b"}'),
        (facts.FINGERPRINTS, '{"a": {"b": {"xxh3_128": 3}}}'),
        (facts.GEOMETRY, "[[1, 2], [3]]"),
        (facts.GEOMETRY, '[["a"]]'),
        (facts.GOALS, '[["a", "sideways"]]'),
        (facts.GOALS, "[[1, 2, 3]]"),
    ],
)
def test_facts_of_another_shape_are_damage(fact: Any, text: str, tmp_path: Path) -> None:
    refused = pytest.raises(JournalError, match="ecotone check")
    with Journal.create(tmp_path / "journal.sqlite", [facts.Note(fact.name, text)]) as journal, refused:
        journal.fact(fact)
