"""Files that are written whole or not at all, and drafts whose makers are gone."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecotone.populations import files
from ecotone.populations.files import abandoned, all_synchronised, drafted, moved, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("content", ["Größe\n", b"\0\xff", ""])
def test_the_file_holds_the_content_and_nothing_is_beside_it(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / ("n" * 250)
    written_whole(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    file = tmp_path / "page.html"
    written_whole(file, "old")
    if call == "write":
        monkeypatch.setattr(os, "fdopen", failing(number))
    else:
        monkeypatch.setattr(os if call == "fsync" else Path, call, failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        written_whole(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert names(tmp_path) == ["page.html"]


def test_modes_are_kept_and_private_files_are_private_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o022)
    try:
        seen = []
        synchronise = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda handle: (seen.append(stat.S_IMODE(os.fstat(handle).st_mode)), synchronise(handle))
        )
        written_whole(tmp_path / "secret", "x", private=True)
        written_whole(tmp_path / "plain", "x")
        (tmp_path / "shared").write_text("old")
        (tmp_path / "shared").chmod(0o664)
        written_whole(tmp_path / "shared", "x")
        written_whole(tmp_path / "shared", "x", private=True)
    finally:
        os.umask(before)
    assert seen[::2] == [0o600, 0o644, 0o664, 0o600]  # every other one is that of the folder
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o600


def test_links_are_followed_and_devices_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    written_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "x"
    written_whole("/dev/null", "x")
    assert not Path("/dev/null").is_file()


def test_of_two_writers_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    link = os.link

    def late(draft: Path, target: Path) -> None:
        file.write_text("the other's")
        link(draft, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError):
        written_whole(file, "ours", exclusive=True)
    assert file.read_text() == "the other's"
    assert names(tmp_path) == ["recipe.yaml"]
    monkeypatch.setattr(os, "link", failing(errno.EPERM))  # a file system without links
    with pytest.raises(FileExistsError):
        moved(tmp_path / "recipe.yaml", file, exclusive=True)
    written_whole(tmp_path / "other", "ours", exclusive=True)
    assert (tmp_path / "other").read_text() == "ours"


def test_a_folder_that_cannot_be_synchronised_is_no_error_but_a_failing_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    all_synchronised(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        all_synchronised(tmp_path)


MAKER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from ecotone.populations.files import drafted
with drafted(Path({target!r}), {folder}) as draft:
    print(draft, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("folder", [True, False])
def test_the_drafts_of_killed_makers_are_found_and_those_of_living_ones_left(tmp_path: Path, folder: bool) -> None:
    root = str(Path(str(files.__file__)).absolute().parents[2])
    code = MAKER.format(root=root, target=str(tmp_path / "merged"), folder=folder)
    (tmp_path / ".mine.1234.partial").mkdir()  # none of ours
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        try:
            assert maker.stdout is not None
            draft = Path(maker.stdout.readline().decode().strip())
            assert draft.is_dir() == folder
            with drafted(tmp_path / "merged", folder) as own:
                assert abandoned(tmp_path) == []
                assert own != draft
            assert not own.exists()
        finally:
            maker.kill()
    assert abandoned(tmp_path) == [draft]
    files.remove(draft)
    assert names(tmp_path) == [".mine.1234.partial"]
