"""Folders that are whole or not there, and the folders beside them that are nobody's but the user's."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import remove_leftovers, replace_folder, try_to_write, written_folder


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_folders_of_the_user_beside_it_stay(tmp_path):
    for name in ("out.part", "out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    for content in ("first", "second"):
        with written_folder(tmp_path / "out") as part:
            (part / content).touch()
        assert names(tmp_path) == sorted(["mine", "mine", "out", "out.part", "out.previous", content])
    new = tmp_path / "new"
    new.mkdir()
    replace_folder(new, tmp_path / "out")
    assert names(tmp_path) == ["mine", "mine", "out", "out.part", "out.previous"]


def test_what_fails_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(FileNotFoundError), written_folder(tmp_path / "out") as part:
        (part / "no such folder" / "new").touch()
    assert names(tmp_path) == ["old", "out"]


def test_two_at_once_do_not_meet(tmp_path):
    with written_folder(tmp_path / "out") as one, written_folder(tmp_path / "out") as other:
        (one / "one").touch()
        (other / "other").touch()
    assert names(tmp_path) == ["one", "out"]


def test_what_a_process_that_died_left_is_removed(tmp_path):
    died = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".{socket.gethostname()}-{died.stdout.strip()}-0a.partial"
    left.mkdir()
    (left / "half").touch()
    elsewhere = tmp_path / f".elsewhere-{died.stdout.strip()}-0a.partial"
    elsewhere.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [elsewhere.name]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("file/below", "file is a file, not a folder"),
        ("/proc/below", "/proc cannot be written to ("),
        ("new/" + "n" * 300, "cannot be written to (File name too long)"),
        ("nul\0l", "cannot be written to (embedded null byte)"),
        ("half-\udce4", "half-\\udce4/probe' is not UTF-8, as names must be"),
    ],
)
def test_where_nothing_can_be_written_is_told(tmp_path, path, says):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        try_to_write(tmp_path / path, "--output", "name another")
    assert str(caught.value).startswith("--output: ")
    assert says in str(caught.value)
    assert str(caught.value).endswith("; name another.")
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    try_to_write(tmp_path / "new" / "folder", "--output", "name another")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot be written to \(No space left on device\); name another"):
        try_to_write(tmp_path / "new" / "folder", "--output", "name another")
    assert names(tmp_path) == []


def test_a_folder_that_may_not_be_entered_is_told(tmp_path, monkeypatch):
    """Root may enter any: what the system says to others is put in its place."""
    locked = tmp_path / "locked"
    locked.mkdir()
    stat, there = Path.stat, os.path.exists

    def refused(self, **options):
        if locked in self.parents:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(self, **options)

    def no_probe(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(os.path, "exists", lambda path: locked not in Path(path).parents and there(path))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", no_probe)
    with pytest.raises(InputError, match=r"locked cannot be written to \(Permission denied\); name another"):
        try_to_write(locked / "deep" / "deeper", "--output", "name another")
