"""The Python that starts at once behaves as one from nothing does."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest


def torch_version():
    return tuple(int(part) for part in version("torch").split(".")[:2])


SHOW = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("OF_THIS_TEST"), __name__, sys.stdin.read()]))
print("an error", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("python", ["new", "forked"])
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_arguments_streams_and_status(forked_python, tmp_path, python, how):
    (tmp_path / "shown.py").write_text(SHOW)
    start = {"-c": ["-c", SHOW], "-m": ["-m", "shown"], "script": ["shown.py"]}[how]
    done = subprocess.run(
        [forked_python if python == "forked" else sys.executable, *start, "a", "--b"], input="é", cwd=tmp_path,
        env={**os.environ, "OF_THIS_TEST": "ü"}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == [["a", "--b"], str(tmp_path), "ü", "__main__", "é"]
    assert (done.stderr, done.returncode) == ("an error\n", 7)


@pytest.mark.parametrize("python", ["new", "forked"])
@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import sys; sys.exit('in words')", 1, "in words\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)", -2, "Interrupt"),
        ("import atexit, sys; atexit.register(print, 'at the end', file=sys.stderr)", 0, "at the end\n"),
    ],
)
def test_ends(forked_python, python, code, status, told):
    python = forked_python if python == "forked" else sys.executable
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert told in done.stderr


def test_our_own_code_is_not_loaded_before_but_from_where_the_process_finds_it(forked_python, tmp_path):
    code = "import sys; print('torch' in sys.modules, [n for n in sys.modules if n.partition('.')[0] in OURS])"
    code = code.replace("OURS", "('msdiffusion', 'data_pipeline')")
    assert subprocess.check_output([forked_python, "-c", code], text=True) == "True []\n"
    (tmp_path / "msdiffusion.py").write_text("found = 'here'")
    code = "import msdiffusion; print(msdiffusion.found)"
    said = subprocess.check_output([forked_python, "-c", code], text=True, cwd=tmp_path)
    assert said == "here\n"


def test_processes_differ_in_what_is_random(forked_python):
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    first, second = (subprocess.check_output([forked_python, "-c", code], text=True).split() for _ in range(2))
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.skipif(torch_version() < (2, 10), reason="there diffusers asks for GPUs while it is imported")
def test_processes_may_use_a_gpu(forked_python):
    code = "import torch; print(torch.cuda._is_in_bad_fork())"
    assert subprocess.check_output([forked_python, "-c", code], text=True) == "False\n"


def test_processes_of_processes(forked_python):
    code = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', PRINT], text=True))"
    code = code.replace("PRINT", repr("import sys; print('torch' in sys.modules)"))
    assert subprocess.check_output([forked_python, "-c", code], text=True).strip() == "True"


def test_multiprocessing(forked_python, tmp_path):
    (tmp_path / "work.py").write_text(
        "import multiprocessing, sys\n"
        "def double(number):\n    return 2 * number, 'torch' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        print(pool.map(double, [1, 2]))\n"
    )
    said = subprocess.check_output([forked_python, "work.py"], text=True, cwd=tmp_path)
    assert said == "[(2, True), (4, True)]\n"


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_arrive(forked_python, tmp_path, number):
    code = (
        f"import pathlib, signal, sys; signal.signal({int(number)}, lambda *_: sys.exit(5)); "
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); signal.pause()"
    )
    process = subprocess.Popen([forked_python, "-c", code])
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    assert process.wait(30) == 5


def test_who_kills_the_caller_kills_the_process(forked_python, tmp_path):
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    process = subprocess.Popen([forked_python, "-c", code], stdout=subprocess.PIPE)
    wait_for(tmp_path / "ready")
    process.kill()
    assert process.communicate(timeout=30)[0] == b""  # whoever held the pipe is gone


def test_other_variables_for_libraries_need_a_new_one(forked_python):
    code = "import sys; print('torch' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    assert subprocess.check_output([forked_python, "-c", code], text=True, env=environment) == "False\n"
