import os
import subprocess
import sys

import pytest

from msdiffusion.environment import DEFAULTS, arithmetic, prepare_environment


@pytest.fixture
def clean(monkeypatch):
    for name in DEFAULTS:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)


def test_what_is_not_set_is_set(clean):
    prepare_environment()
    assert os.environ["MKL_CBWR"] == "AVX2"
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("value", ["COMPATIBLE", ""])
def test_what_a_user_has_set_stays(clean, monkeypatch, value):
    monkeypatch.setenv("MKL_CBWR", value)
    prepare_environment()
    assert os.environ["MKL_CBWR"] == value


def test_what_computes_here_is_named(monkeypatch):
    import torch

    for name in ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    found = arithmetic("cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    assert found["arithmetic"] == f"{capability} MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 threads={threads}"
    assert found["processor"]


def test_a_machine_that_does_not_list_its_processor(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert arithmetic("cpu")["processor"] == "arm64"


@pytest.mark.parametrize(
    "command",
    [
        "import msdiffusion.cli as c; c.main(['generate', '--prompt', 'x', '--out', 'x.png'])",
        "import msdiffusion.training.cli as c; c.main(['fit', '--help'])",
        "import msdiffusion.training.precompute as c; c.main(['--workers', '-1'])",
    ],
    ids=["msdiffusion", "lightning", "precompute"],
)
def test_every_command_that_computes_sets_it_before_torch_is_loaded(command):
    """The finder sees each import of torch; the first one must find the variables set."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            seen.append(os.environ.get('MKL_CBWR'))\n"
        "seen = []\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"try:\n    {command}\nexcept SystemExit:\n    pass\n"
        "assert os.environ['MKL_CBWR'] == 'AVX2', os.environ.get('MKL_CBWR')\n"
        "assert set(seen) <= {'AVX2'}, seen\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-2000:]


def test_importing_the_package_leaves_the_environment_alone():
    code = f"import os; from msdiffusion import MSDiffusion; print({set(DEFAULTS)!r}.isdisjoint(os.environ))"
    environment = {name: value for name, value in os.environ.items() if name not in DEFAULTS}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert answer.stdout.split()[-1:] == ["True"], answer.stderr[-2000:]
