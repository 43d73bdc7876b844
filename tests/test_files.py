"""Folders that are whole or not there, and the folders beside them that are nobody's but the user's."""

import socket
import subprocess
import sys

import pytest

from gist_fast.runtime.files import remove_leftovers, replace_folder, written_folder


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
