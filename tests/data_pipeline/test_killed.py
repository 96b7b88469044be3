"""SIGKILL at random moments, then the same command again: the dataset of an uninterrupted run, byte for byte.

Three kills in the suite; by hand as many as you like:
``KILLS=30 KILL_SEED=1 pytest tests/data_pipeline/test_killed.py``.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.build import main

ROOT = Path(__file__).parents[2]
CLIPS = 16


def content(out: Path) -> dict[str, bytes]:
    """Everything in a dataset but build.json, which holds no time either, and the times of the steps in the report."""
    names = [*sorted(path.name for path in out.glob("*.tar")), "index.parquet", "rejected.jsonl"]
    return {name: (out / name).read_bytes() for name in names}


def start(command: list[str]) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "data_pipeline.build", *command]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(write_clip, tmp_path):
    for i in range(CLIPS):
        write_clip(tmp_path / "videos", f"clip_{i:02d}", ("dog", "cat", "fish")[: 1 + i % 3], seed=i)
    (tmp_path / "videos/empty.mp4").write_bytes(b"")
    command = ["--videos", str(tmp_path / "videos"), "--pairs-per-shard", "5", "--quiet"]
    command += ["--detector", "annotations"]
    assert main([*command, "--out", str(tmp_path / "whole"), "--workers", "0"]) == 0

    kills = int(os.environ.get("KILLS", "3"))
    draw = random.Random(int(os.environ.get("KILL_SEED", "0")))
    out, killed = tmp_path / "killed", 0
    for number in range(kills):
        # Every few kills from the start again, so that early moments are met as often as late ones.
        if number % 3 == 0:
            out = tmp_path / f"killed_{number}"
        process = start([*command, "--out", str(out), "--workers", "2"])
        wanted = draw.randrange(CLIPS + 2)
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(out.glob(".mining/*/*.json"))) < wanted:
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if number % 3 == 2 or number == kills - 1:
            assert main([*command, "--out", str(out), "--workers", "0"]) == 0
            assert content(out) == content(tmp_path / "whole")
            assert not (out / ".mining").exists()
            assert not list(out.rglob(".*.tmp"))
    assert killed >= kills / 2, f"only {killed} of {kills} runs were still at work when they were killed"
