"""Hostile input by name: headers of safetensors files and recipes, each with whether it is to be taken.

``HEADERS`` are whole files. The library ``safetensors`` takes those of ``TAKEN_HEADERS`` and of ``STRICTER``; Ecotone
takes the first alone. ``RECIPES`` are bytes of YAML files. Those of ``TAKEN_RECIPES`` are taken, the others refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

Outcome = Literal["refused", "accepted", "traceback"]

_FLOAT = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'
_FOUR = bytes(4)
_HUGE = b"1" + b"0" * 30


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file. ``length`` is what it says of its header's."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def _one(entry: bytes, data: bytes = _FOUR, name: bytes = b"a") -> bytes:
    """A file of one tensor."""
    return file_of(b'{"' + name + b'":' + entry + b"}", data)


def _with(**fields: bytes) -> bytes:
    """An entry of four bytes with other fields."""
    known = {"dtype": b'"F32"', "shape": b"[1]", "data_offsets": b"[0,4]"} | fields
    return b"{" + b",".join(b'"' + key.encode() + b'":' + value for key, value in known.items()) + b"}"


def _several(*places: tuple[int, int, int], data: int) -> bytes:
    """A file of float32 vectors, each of a length and with the offsets of its bytes."""
    entries = [
        b'"t%d":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}' % (number, length, start, stop)
        for number, (length, start, stop) in enumerate(places)
    ]
    return file_of(b"{" + b",".join(entries) + b"}", bytes(data))


def _meta(value: bytes) -> bytes:
    return file_of(b'{"__metadata__":' + value + b',"a":{' + _FLOAT + b"}}", _FOUR)


TAKEN_HEADERS: dict[str, bytes] = {
    "plain": _one(_with()),
    "padded with spaces": file_of(b'{"a":{' + _FLOAT + b"}}     ", _FOUR),
    "padded with line breaks and tabs": file_of(b'{"a":{' + _FLOAT + b"}}\n\t\r\n", _FOUR),
    "entries out of order": _several((1, 4, 8), (1, 0, 4), data=8),
    "a tensor of no bytes at the end": _several((1, 0, 4), (0, 4, 4), data=4),
    "a tensor of no bytes at the beginning": _several((1, 0, 4), (0, 0, 0), data=4),
    "a single number": _one(_with(shape=b"[]")),
    "metadata": _meta(b'{"format":"pt","note":"\\u001b[31m"}'),
    "no metadata": _meta(b"null"),
    "a field that the format may grow": _one(_with(more=b'{"deep":[[1.5]]}')),
    "no tensor": file_of(b"{}"),
    "a name of other letters": _one(_with(), name="größe.重み".encode()),
    "an escaped name": _one(_with(), name=b"\\u00e9\\ud83d\\ude00"),
}

STRICTER: dict[str, bytes] = {
    "begins with a space": file_of(b' {"a":{' + _FLOAT + b"}}", _FOUR),
    "a tensor twice": file_of(b'{"a":{' + _FLOAT + b'},"a":{' + _FLOAT + b"}}", _FOUR),
    "a tensor twice, the first out of the file": file_of(
        b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]},"a":{' + _FLOAT + b"}}", _FOUR
    ),
    "a key of the metadata twice": _meta(b'{"x":"1","x":"2"}'),
    "an entry that is a list": _one(b'["F32",[1],[0,4]]'),
    "a shape beyond torch beside a zero": _one(
        _with(shape=b"[0,1099511627776,1099511627776]", data_offsets=b"[0,0]"), b""
    ),
    "an extent beyond torch beside a zero": _one(_with(shape=b"[0,9223372036854775808]", data_offsets=b"[0,0]"), b""),
    "a name with a terminal's link": _one(_with(), name=b"\\u001b]8;;http://evil\\u0007"),
    "a name with a line of its own": _one(_with(), name=b"a\\nerror: fake"),
    "a name with a deletion": _one(_with(), name=b"\x7f"),
    "a name that turns the writing": _one(_with(), name="a\u202egnp".encode()),
    "a name with what cannot be seen": _one(_with(), name="a\u200bb".encode()),
    "no name": _one(_with(), name=b""),
    "a name of 2000 characters": _one(_with(), name=b"a" * 2000),
    "a type that torch lacks": _one(_with(dtype=b'"F4"', shape=b"[8]")),
}

REFUSED_HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\2\0\0\0\0\0\0",
    "no header": (0).to_bytes(8, "little"),
    "a length beyond the file": file_of(b"{}", length=3),
    "a length beyond 64 bits of sense": file_of(b"{}", length=2**64 - 1),
    "a length beyond the format's": file_of(b"{}", length=100_000_001),
    "cut in the header": _one(_with())[:40],
    "cut in the data": _one(_with())[:-1],
    "bytes behind the data": _one(_with()) + b"\0",
    "data without a tensor": file_of(b"{}", b"\0"),
    "overlapping": _several((1, 0, 4), (1, 0, 4), data=8),
    "overlapping by half": _several((2, 0, 8), (2, 4, 12), data=12),
    "a hole": _several((1, 0, 4), (1, 8, 12), data=12),
    "begins late": _several((1, 4, 8), data=8),
    "a tensor of no bytes inside another": _several((2, 0, 8), (0, 4, 4), data=8),
    "offsets that fall": _one(_with(data_offsets=b"[4,0]")),
    "offsets below 0": _one(_with(data_offsets=b"[-4,0]")),
    "minus nought": _one(_with(data_offsets=b"[-0,4]")),
    "three offsets": _one(_with(data_offsets=b"[0,4,4]")),
    "one offset": _one(_with(data_offsets=b"[4]")),
    "offsets of fractions": _one(_with(data_offsets=b"[0.0,4.0]")),
    "offsets of text": _one(_with(data_offsets=b'["0","4"]')),
    "offsets of true": _one(_with(shape=b"[]", dtype=b'"BOOL"', data_offsets=b"[false,true]"), b"\0"),
    "offsets of nothing": _one(_with(data_offsets=b"[null,null]")),
    "offsets that are no list": _one(_with(data_offsets=b'{"0":4}')),
    "offsets of 10^30": _one(_with(data_offsets=b"[0," + _HUGE + b"]")),
    "an offset of infinity": _one(_with(data_offsets=b"[0,Infinity]")),
    "an offset of NaN": _one(_with(data_offsets=b"[NaN,4]")),
    "an offset of 5000 digits": _one(_with(data_offsets=b"[0," + b"9" * 5000 + b"]")),
    "a shape of fractions": _one(_with(shape=b"[1.0]")),
    "a shape of powers": _one(_with(shape=b"[1e0]")),
    "a shape of true": _one(_with(shape=b"[true]")),
    "a shape of text": _one(_with(shape=b'["1"]')),
    "a shape of nothing": _one(_with(shape=b"[null]")),
    "a shape that is nothing": _one(_with(shape=b"null")),
    "a shape that is text": _one(_with(shape=b'"1"')),
    "a shape that is a number": _one(_with(shape=b"1")),
    "a shape below 0": _one(_with(shape=b"[-1]")),
    "a shape of two negatives": _one(_with(shape=b"[-1,-1]")),
    "a shape of lists": _one(_with(shape=b"[[1]]")),
    "a shape of infinity": _one(_with(shape=b"[Infinity]")),
    "a shape of 10^30": _one(_with(shape=b"[" + _HUGE + b"]")),
    "a shape of 10^30 and nought": _one(_with(shape=b"[" + _HUGE + b",0]", data_offsets=b"[0,0]"), b""),
    "a shape that overflows to nought": _one(_with(shape=b"[4294967296,4294967296]", data_offsets=b"[0,0]"), b""),
    "a shape that overflows before a nought": _one(
        _with(shape=b"[1099511627776,1099511627776,0]", data_offsets=b"[0,0]"), b""
    ),
    "a shape of other bytes": _one(_with(shape=b"[2]")),
    "a type that is a number": _one(_with(dtype=b"32")),
    "a type that is a list": _one(_with(dtype=b'["F32"]')),
    "a type that is nothing": _one(_with(dtype=b"null")),
    "a type in small letters": _one(_with(dtype=b'"f32"')),
    "no type": _one(b'{"shape":[1],"data_offsets":[0,4]}'),
    "no shape": _one(b'{"dtype":"F32","data_offsets":[0,4]}'),
    "no offsets": _one(b'{"dtype":"F32","shape":[1]}'),
    "a type twice": _one(b'{"dtype":"F32",' + _FLOAT + b"}"),
    "offsets twice": _one(b'{"data_offsets":[0,8],' + _FLOAT + b"}"),
    "an entry of nothing": _one(b"null"),
    "an entry of text": _one(b'"F32"'),
    "a header of a list": file_of(b"[]"),
    "a header of text": file_of(b'"a"'),
    "a header of nothing": file_of(b"null"),
    "two headers": file_of(b"{}{}"),
    "a header with a comma more": file_of(b'{"a":{' + _FLOAT + b"},}", _FOUR),
    "padded with noughts": file_of(b'{"a":{' + _FLOAT + b"}}\0\0", _FOUR),
    "a mark of byte order": file_of(b'\xef\xbb\xbf{"a":{' + _FLOAT + b"}}", _FOUR),
    "UTF-16": file_of(('{"a":{' + _FLOAT.decode() + "}}").encode("utf-16-le"), _FOUR),
    "no UTF-8": _one(_with(), name=b"\xff"),
    "half a pair, escaped": _one(_with(), name=b"\\ud800"),
    "half a pair, encoded": _one(_with(), name=b"\xed\xa0\x80"),
    "half a pair in the metadata": _meta(b'{"x":"\\udfff"}'),
    "a raw escape in a name": _one(_with(), name=b"\x1b[31m"),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{},"a":{' + _FLOAT + b"}}", _FOUR),
    "metadata of a list": _meta(b"[]"),
    "metadata of text": _meta(b'"x"'),
    "metadata of a number": _meta(b'{"x":1}'),
    "metadata of nothing": _meta(b'{"x":null}'),
    "metadata of metadata": _meta(b'{"x":{"y":"z"}}'),
    "a field of NaN": _one(_with(more=b"NaN")),
    "a field beyond a double": _one(_with(more=b"1e999")),
    "a field 200 deep": _one(_with(more=b"[" * 200 + b"]" * 200)),
    "a field 100,000 deep": _one(_with(more=b"[" * 100_000 + b"]" * 100_000)),
    "a header 100,000 deep": file_of(b'{"a":' * 100_000),
    "a pickle": b"\x80\x02}q\x00.",
    "a zip": b"PK\x03\x04" + bytes(40),
}

HEADERS: dict[str, bytes] = {**TAKEN_HEADERS, **STRICTER, **REFUSED_HEADERS}
"""All of them, as files."""

_REST = """
models: {experts: [a.safetensors, b.safetensors]}
objectives: {search: [{name: acc, type: call, call: "m:f", direction: maximize}]}
budget: {evaluations: 10}
"""
PLAIN = f"name: toy{_REST}"
"""A recipe that is taken, as text."""


def _laughs(fields: int = 9, levels: int = 10) -> str:
    """Mappings of aliases of each other: ``fields ** levels`` values."""
    first = "l0: &l0 [" + ",".join("x" * fields) + "]\n"
    return first + "".join(
        f"l{level}: &l{level} [{','.join([f'*l{level - 1}'] * fields)}]\n" for level in range(1, levels)
    )


TAKEN_RECIPES: dict[str, bytes] = {
    "plain": PLAIN.encode(),
    "a mark of byte order": b"\xef\xbb\xbf" + PLAIN.encode(),
    "line ends of Windows": PLAIN.replace("\n", "\r\n").encode(),
    "a merged mapping with a key anew": (
        PLAIN.replace("{evaluations: 10}", "{<<: &b {evaluations: 9}, evaluations: 10}")
    ).encode(),
    "an alias": PLAIN.replace("[a.safetensors, b.safetensors]", "[&a a.safetensors, *a]").encode(),
    "a number in hexadecimal": f"seed: 0x1f\n{PLAIN}".encode(),
    "a number with underscores": PLAIN.replace("evaluations: 10", "evaluations: 1_000").encode(),
    "a name in quotes that is no truth": f"name: 'no'{_REST}".encode(),
    "a tag of text": f"name: !!str toy{_REST}".encode(),
    "one document, begun": f"---\n{PLAIN}...\n".encode(),
}

REFUSED_RECIPES: dict[str, bytes] = {
    "empty": b"",
    "only a comment": b"# nothing\n",
    "a list": b"- a\n- b\n",
    "a text": b"hello\n",
    "two documents": f"{PLAIN}---\n{PLAIN}".encode(),
    "a key twice": f"{PLAIN}name: other\n".encode(),
    "a key twice, nested": PLAIN.replace("{evaluations: 10}", "{evaluations: 10, evaluations: 20}").encode(),
    "a key twice, in a list": PLAIN.replace("name: acc,", "name: acc, name: bcc,").encode(),
    "a key twice, once in quotes": f'{PLAIN}"name": other\n'.encode(),
    "a key twice, once by an alias": f"{PLAIN}*n : x\n".replace("name: toy", "&n name: toy").encode(),
    "two merges": PLAIN.replace("{evaluations: 10}", "{<<: {evaluations: 9}, <<: {seconds: 9}}").encode(),
    "a merge of a number": PLAIN.replace("{evaluations: 10}", "{<<: 5}").encode(),
    "a billion laughs": f"{_laughs()}{PLAIN}".encode(),
    "a quadratic blow-up": f"x: &x {'y' * 100_000}\nz: [{','.join(['*x'] * 1000)}]\n{PLAIN}".encode(),
    "an anchor that contains itself": f"x: &x [*x]\n{PLAIN}".encode(),
    "an alias of nothing": f"x: *nothing\n{PLAIN}".encode(),
    "200 deep": f"name: {'[' * 200}{']' * 200}{_REST}".encode(),
    "100,000 deep": f"name: {'[' * 100_000}{']' * 100_000}{_REST}".encode(),
    "100,000 deep in mappings": ("{a: " * 100_000).encode(),
    "100,000 deep in blocks": ("- " * 100_000).encode(),
    "a million digits": f"seed: {'9' * 1_000_000}\n{PLAIN}".encode(),
    "a million digits in hexadecimal": f"seed: 0x{'f' * 1_000_000}\n{PLAIN}".encode(),
    "a million digits in base 60": f"seed: {':'.join(['59'] * 300_000)}\n{PLAIN}".encode(),
    "base 60": f"seed: 1:30\n{PLAIN}".encode(),
    "base 8": f"seed: 010\n{PLAIN}".encode(),
    "a power that is text": PLAIN.replace("evaluations: 10", "evaluations: 1e3").encode(),
    "infinity": f"seed: .inf\n{PLAIN}".encode(),
    "not a number": f"seed: .nan\n{PLAIN}".encode(),
    "a date": f"seed: 2024-01-01\n{PLAIN}".encode(),
    "no date": f"seed: 2024-99-99\n{PLAIN}".encode(),
    "no as a name": f"name: no{_REST}".encode(),
    "on as a name": PLAIN.replace("name: acc", "name: on").encode(),
    "yes as a number": PLAIN.replace("evaluations: 10", "evaluations: yes").encode(),
    "nothing as a name": f"name: ~{_REST}".encode(),
    "a number as a name": f"name: 1.5{_REST}".encode(),
    "a key of a number": f"1: x\n{PLAIN}".encode(),
    "a key of a truth": PLAIN.replace("{evaluations: 10}", "{on: 1, evaluations: 10}").encode(),
    "a key of a list": f"[a]: x\n{PLAIN}".encode(),
    "a key of a mapping": f"? {{a: b}}\n: x\n{PLAIN}".encode(),
    "Python's own tag": f'name: !!python/object/apply:os.system ["true"]{_REST}'.encode(),
    "a tag of somebody's": f"name: !mine toy{_REST}".encode(),
    "a tag of bytes": f"name: !!binary dG95{_REST}".encode(),
    "a tag of a set": f"x: !!set {{a}}\n{PLAIN}".encode(),
    "a tag that does not fit": f"seed: !!int many\n{PLAIN}".encode(),
    "a truth that is none": f"x: !!bool maybe\n{PLAIN}".encode(),
    "an equals sign": f"x: =\n{PLAIN}".encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-32": PLAIN.encode("utf-32"),
    "Latin-1": f"name: t\xf6y{_REST}".encode("latin-1"),
    "bytes of a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "a zero byte": f"name: to\0y{_REST}".encode(),
    "a terminal's escape": f"name: \x1b[31mtoy{_REST}".encode(),
    "an escape in quotes": f'name: "\\e]8;;http://evil\\a"{_REST}'.encode(),
    "an objective's name that turns the writing": PLAIN.replace("name: acc", 'name: "a\\u202egnp"').encode(),
    "an objective without a name": PLAIN.replace("name: acc", 'name: ""').encode(),
    "half a pair": f'name: "\\ud800"{_REST}'.encode(),
    "a tab": f"\tname: toy{_REST}".encode(),
    "a list that does not end": f"name: [{_REST}".encode(),
    "quotes that do not end": f'name: "{_REST}'.encode(),
    "a colon more": f"name: toy: x{_REST}".encode(),
    "17 MiB": b"#" * (17 << 20),
    "300,000 values": b"x: [" + b"[]," * 300_000 + b"]\n" + PLAIN.encode(),
    "a version of the future": f"%YAML 3.0\n---\n{PLAIN}".encode(),
}

RECIPES: dict[str, bytes] = {**TAKEN_RECIPES, **REFUSED_RECIPES}
"""All of them, as files."""


def outcome(read: Callable[[Path], object], content: bytes, file: Path) -> Outcome:
    """What a reader makes of a file with that content: refused in words, accepted, or a traceback."""
    from ecotone.populations.errors import EcotoneError

    file.write_bytes(content)
    try:
        read(file)
    except EcotoneError:
        return "refused"
    except BaseException:
        return "traceback"
    return "accepted"


def read_header(file: Path) -> object:
    """Open a safetensors file as a run does."""
    from ecotone.merging.models.checkpoint import read_header as read

    return read(file)


def read_recipe(file: Path) -> object:
    """Read a recipe as a run does."""
    from ecotone import Recipe

    return Recipe.from_yaml(file)
