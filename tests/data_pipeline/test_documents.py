"""The commands of docs/mining.md do what they say for a reader who has nothing but the package."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.options import make_parser

PAGE = Path(__file__).parents[2] / "docs/mining.md"
# What has no machine here: `--ray` is tested in test_run_ray.py, and pip installs nothing in a test.
LEFT_OUT = ("--ray", "pip install")


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_every_command_runs(tmp_path):
    from data_pipeline.world.clips import write_clips

    write_clips(tmp_path / "clips", count=3, seed=0)
    done = []
    for command in commands():
        if any(word in " ".join(command) for word in LEFT_OUT):
            continue
        assert command[:2] == ["python", "-m"]
        run = [sys.executable, *command[1:]]
        result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
        if command[2] == "data_pipeline.build":  # later commands call a dataset OUT
            out = command[command.index("--out") + 1] if "--out" in command else "clips-pairs"
            shutil.rmtree(tmp_path / "OUT", ignore_errors=True)
            shutil.copytree(tmp_path / out, tmp_path / "OUT")
        done.append(command[2])
    assert done.count("data_pipeline.build") >= 2
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_every_option_that_is_named_is_there():
    known = set(make_parser()._option_string_actions)
    text = PAGE.read_text(encoding="utf-8")
    others = {"--count", "--split", "--number", "--key", "--list"}  # of data_pipeline.world and inspect
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known - others == set()


def test_the_page_is_short():
    assert len(PAGE.read_text(encoding="utf-8").split()) <= 3500
