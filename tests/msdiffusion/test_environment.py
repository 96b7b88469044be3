import os
import subprocess
import sys

import pytest

from msdiffusion.environment import DEFAULTS, prepare_environment


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
