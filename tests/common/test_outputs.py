"""Where results can be written: a folder or a file that can be made, what is free, and what may be replaced."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from s2ft.common.errors import S2FTError
from s2ft.common.files import new_file, staged
from s2ft.common.outputs import check_free, check_place, check_writable


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A file, a folder that holds one, and a link to nothing."""
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.json").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path


def free_file(path: Path) -> None:
    check_free(path, path.suffix)


def report(path: Path) -> None:
    check_writable(path)


@pytest.mark.parametrize(
    ("check", "taken"),
    [
        (check_place, ["new", "deep/er/new", "empty", "full"]),
        (check_free, ["new", "deep/er/new", "empty"]),
        (free_file, ["new.gguf", "deep/er/new.gguf"]),
        (report, ["new.json", "full/a.json", "/dev/null"]),
    ],
)
def test_what_can_be_written_is_taken_and_nothing_is_made(
    check: Callable[[Path], None], taken: list[str], there: Path
) -> None:
    before = sorted(there.rglob("*"))
    for name in taken:
        check(there / name)
    assert sorted(there.rglob("*")) == before


@pytest.mark.parametrize(
    ("check", "name", "message"),
    [
        (check_place, "file", "is a file; name a folder"),
        (check_place, "link", "is a file; name a folder"),
        (check_place, "file/x/y", "file' is a file, not a folder"),
        (check_free, "full", "holds files already"),
        (check_free, "link", "is a file; name a folder"),
        (free_file, "full/a.json", "exists already; name another file"),
        (free_file, "file/a.gguf", "file' is a file, not a folder"),
        (report, "full", "is a folder; name a file"),
        (report, "none/a.json", "there is no folder"),
    ],
)
def test_what_cannot_is_named_with_the_reason(
    check: Callable[[Path], None], name: str, message: str, there: Path
) -> None:
    with pytest.raises(S2FTError, match=rf"^(output|json)='{there / name}'.*{message}"):
        check(there / name)


@pytest.mark.parametrize("check", [check_place, check_free, free_file, report])
def test_a_name_with_a_nul_character_is_refused(check: Callable[[Path], None], there: Path) -> None:
    with pytest.raises(S2FTError, match="holds a NUL character"):
        check(there / "a\0.gguf")


@pytest.mark.parametrize("check", [check_place, check_free, free_file, report])
def test_places_that_may_not_be_written_to_are_refused(
    check: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(S2FTError, match=rf"you may not write there \('{tmp_path}'\); name another"):
        check(tmp_path / "new")


def test_a_folder_that_cannot_be_made_is_refused_by_the_writer_too() -> None:
    with pytest.raises(S2FTError, match="cannot be written to"), staged(Path("/proc/x")):
        pass


def test_two_files_can_be_written_into_one_folder_at_a_time(tmp_path: Path) -> None:
    with new_file(tmp_path / "a.gguf") as first:
        first.write_text("a")
        with new_file(tmp_path / "b.gguf") as second:
            second.write_text("b")
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("a.gguf", "a"), ("b.gguf", "b")]
