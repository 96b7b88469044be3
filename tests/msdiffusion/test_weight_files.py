import os

import pytest
import torch
from safetensors.torch import load_file

from msdiffusion.weight_files import share, write_weights


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_weights({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
        (tmp_path / "a.safetensors").chmod(0o400)
        share(tmp_path)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
        write_weights({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"schema": "x"})
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_behind_links_keep_their_mode(tmp_path):
    theirs = tmp_path / "theirs.safetensors"
    theirs.touch(0o600)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "link.safetensors").symlink_to(theirs)
    share(tmp_path / "ours")
    assert theirs.stat().st_mode & 0o777 == 0o600


def test_who_has_a_file_open_keeps_it(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights({"weight": torch.ones(1000)}, path)
    mapped = load_file(path)
    write_weights({"weight": torch.zeros(3)}, path)
    assert mapped["weight"].sum() == 1000
    assert load_file(path)["weight"].shape == (3,)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights({"weight": torch.ones(2)}, path)
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):
        write_weights({"one": shared, "two": shared}, path)
    assert load_file(path).keys() == {"weight"}
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
