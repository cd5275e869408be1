"""Folders within folders: listed and removed however deep they are, and no link is followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disks import immovable

from hubaoti.folder_trees import list_files, remove_tree


def nest(folder: Path, depth: int) -> None:
    """Folders within each other, deeper than Python recurses, with odd things between them."""
    handle = os.open(folder, os.O_RDONLY)
    for level in range(depth):
        os.mkdir("a" * 5, dir_fd=handle)
        below = os.open("a" * 5, os.O_RDONLY, dir_fd=handle)
        if level % 100 == 0:
            os.symlink("/", "link", dir_fd=below)
            os.mkfifo("pipe", dir_fd=below)
            os.mkdir("shut", 0, dir_fd=below)
        os.close(handle)
        handle = below
    os.close(handle)


@pytest.mark.parametrize("depth", [0, 1, 500, 5000])
def test_a_tree_is_removed_however_deep_it_is(tmp_path: Path, depth: int) -> None:
    (tmp_path / "tree").mkdir()
    nest(tmp_path / "tree", depth)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    (tmp_path / "tree/below").mkdir(parents=True)
    for name in ("tree/link", "tree/below/link", "link"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    assert [*list_files(tmp_path / "tree/below")] == [tmp_path / "tree/below/link"]
    remove_tree(tmp_path / "tree")
    with pytest.raises(NotADirectoryError):
        remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "link", ignore_errors=True)
    remove_tree(tmp_path / "absent", ignore_errors=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "mine/file").read_text() == "mine"


def test_what_cannot_be_removed_stays_and_everything_else_goes(tmp_path: Path) -> None:
    for name in ("a/b", "c", "d"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "file").write_text("x")
    with immovable(tmp_path / "tree/a/b/file"):
        with pytest.raises(PermissionError):
            remove_tree(tmp_path / "tree")
        assert [*list_files(tmp_path / "tree")] == [tmp_path / "tree/a/b/file"]
        assert [each.name for each in (tmp_path / "tree").iterdir()] == ["a"]
        remove_tree(tmp_path / "tree", ignore_errors=True)
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_files_are_listed_however_deep_they_lie(tmp_path: Path) -> None:
    nest(tmp_path, 600)
    assert len([*list_files(tmp_path)]) == 12
    remove_tree(tmp_path / "aaaaa")
