"""A Python for tests that starts at once: its processes are forks of one that has loaded the libraries already.

Loading torch, diffusers and Lightning costs a test more than what it looks at. ``start(folder)`` makes an executable in
the folder that is called like Python, with ``-c``, ``-m`` or a script, and so are the processes that such a process
starts as ``sys.executable``. Only other people's libraries are loaded before: our own code is imported by each process,
from where it would import it. What has to be a Python from nothing (who looks at imports, at memory, at what is set
before them) starts ``sys.executable`` of the test; so does the executable itself, where variables that libraries read
when they are loaded have other values than those of the server.

As a program, this file is the server. It ends when nobody who called ``start`` lives any more.
"""

import atexit
import contextlib
import fcntl
import gc
import io
import json
import multiprocessing.spawn
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

READ_WHEN_LOADED = (
    "ATEN_", "DIFFUSERS_", "DNNL_", "HF_", "HOME", "HUGGINGFACE_", "KMP_", "MKL_", "MPLBACKEND", "MPLCONFIGDIR", "OMP_",
    "ONEDNN_", "OPENBLAS_", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTORCH_", "TMPDIR", "TORCH_", "TRANSFORMERS_", "XDG_",
)  # fmt: skip
"""Beginnings of the variables' names."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
CALLER = """#!{python} -IS
import json, os, select, signal, socket, struct, sys
environment, arguments = dict(os.environ), sys.argv[1:]
while arguments and arguments[0] in ("-u", "-B"):
    del arguments[0]
if (
    not arguments
    or (arguments[0][:1] == "-" and arguments[0] not in ("-c", "-m"))
    or {{name: value for name, value in environment.items() if name.startswith({prefixes!r})}} != {loaded!r}
):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
def is_open(file):
    try:
        return os.fstat(file)
    except OSError:
        return False
files = [file for file in map(int, os.listdir("/proc/self/fd")) if is_open(file)]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([files, arguments, environment, os.getcwd()]).encode()
socket.send_fds(server, [struct.pack("Q", len(asked))], files)
server.sendall(asked)
server.setblocking(False)
signal.set_wakeup_fd(server.fileno())
for number in {forwarded!r}:
    signal.signal(number, lambda *_: None)  # its number has been sent by then
select.select([server], [], [])
answer = server.recv(4)
status = struct.unpack("i", answer)[0] if len(answer) == 4 else 1
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    signal.pause()
sys.exit(status)
"""


def start(folder: Path) -> str:
    """The executable in this folder; the server behind it is started by whoever comes first, and serves all."""
    if not hasattr(os, "pidfd_open"):
        return sys.executable  # only Linux can tell of a process that ends
    executable, address = folder / "python", str(folder / "socket")
    if len(address) > 100:
        return sys.executable  # more than the name of a socket may have
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            loaded = {name: value for name, value in os.environ.items() if name.startswith(READ_WHEN_LOADED)}
            with (folder / "log.txt").open("w") as log:
                server = subprocess.Popen(
                    [sys.executable, __file__, address], stdout=log, stderr=log, start_new_session=True
                )
            executable.write_text(
                CALLER.format(
                    python=sys.executable, prefixes=READ_WHEN_LOADED, loaded=loaded, address=address,
                    forwarded=tuple(map(int, FORWARDED)),
                )
            )  # fmt: skip
            executable.chmod(0o755)
            while not Path(address).exists():
                if server.poll() is not None:
                    raise RuntimeError(f"the server of {__file__} ended: see {folder / 'log.txt'}")
                time.sleep(0.01)
    _connections.append(socket.socket(socket.AF_UNIX))
    _connections[-1].connect(address)
    socket.send_fds(_connections[-1], [struct.pack("Q", 0)], [])
    return str(executable)


_connections = list[socket.socket]()
"""They end with this process; so the server knows whether anybody is left."""


def load_libraries() -> None:
    import torch

    # Diffusers asks for a GPU when it is imported; after that, torch lets no fork have one.
    with mock.patch("torch.accelerator.is_available", return_value=False):
        import diffusers
        import matplotlib.figure
        import pyarrow
        import pytorch_lightning.cli
        import torchvision
        import transformers

        # what they load when it is first asked for
        for library, names in (
            (diffusers, ("StableDiffusionXLPipeline", "StableDiffusionPipeline", "AutoencoderKL", "DDPMScheduler")),
            (transformers, ("CLIPImageProcessor", "CLIPTextModelWithProjection", "CLIPTokenizer",
                            "CLIPVisionModelWithProjection")),
        ):  # fmt: skip
            for name in names:
                getattr(library, name)
    del torch, torchvision, pytorch_lightning, matplotlib, pyarrow


def serve(address: str) -> tuple[list[str], dict[str, str], str] | None:
    """Forks for whoever asks. Returns in a fork: its arguments, environment and folder; in the server when all left."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    load_libraries()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever guards a process is not waited for
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    callers = set[socket.socket]()
    while True:
        for key, _ in waiting.select():
            if key.fileobj is not listener:
                waiting.unregister(key.fileobj)
                callers.remove(key.fileobj)
                key.fileobj.close()
                if not callers:
                    return None
                continue
            connection, _ = listener.accept()
            header, files, _, _ = socket.recv_fds(connection, 8, 250)
            if len(header) < 8:  # it was killed before it asked
                connection.close()
                continue
            length = struct.unpack("Q", header)[0]
            if not length:
                callers.add(connection)
                waiting.register(connection, selectors.EVENT_READ)
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listener, waiting, *callers):
                    other.close()
                asked = connection.recv(length, socket.MSG_WAITALL)
                process = os.fork()
                if process == 0:
                    connection.close()
                    numbers, *rest = json.loads(asked)
                    above = max(*files, *numbers) + 1
                    files = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
                    os.closerange(0, above)
                    for number, file in zip(numbers, files, strict=True):
                        os.dup2(file, number)
                    os.closerange(above, max(files) + 1)
                    return rest
                for file in files:
                    os.close(file)
                guard(process, connection)
            for file in files:
                os.close(file)
            connection.close()


def guard(process: int, connection: socket.socket) -> None:
    """Passes signals on, and tells how the process ended. The process is killed where its caller was."""
    waiting = selectors.DefaultSelector()
    waiting.register(connection, selectors.EVENT_READ)
    ended = os.pidfd_open(process)
    waiting.register(ended, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj == ended:
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with contextlib.suppress(OSError):
                    connection.sendall(struct.pack("i", status))
                os._exit(0)
            number = connection.recv(1)
            if not number:
                waiting.unregister(connection)
            os.kill(process, number[0] if number else signal.SIGKILL)


def become(arguments: list[str], environment: dict[str, str], folder: str, executable: str, library: list[str]) -> None:
    """Runs what a new Python with these arguments would run. library: sys.path without anybody's own places."""
    import random
    import runpy

    import numpy as np
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        raw = io.FileIO(number, mode, closefd=False)
        told = io.TextIOWrapper(
            raw, "utf-8", "backslashreplace" if name == "stderr" else "strict", line_buffering=name == "stderr",
            write_through=name == "stderr" or "PYTHONUNBUFFERED" in environment,
        )  # fmt: skip
        setattr(sys, name, told)
        setattr(sys, f"__{name}__", told)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    random.seed()
    np.random.seed()
    torch.seed()
    sys.executable = executable
    multiprocessing.set_executable(executable)
    multiprocessing.process.ORIGINAL_DIR = folder
    how, *rest = arguments
    first = {"-c": "", "-m": folder}.get(how, str(Path(how).resolve().parent))
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *library]
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = type(sys)("__main__")
        main.__spec__ = main.__loader__ = None
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif how == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(how, run_name="__main__")


def main() -> None:
    own = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    library = [place for place in sys.path if place not in own]
    sys.path[:] = library
    asked = serve(sys.argv[1])
    if asked is None:
        os._exit(0)
    status: object = 0
    try:
        become(*asked, str(Path(sys.argv[1]).with_name("python")), library)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    # what the end of a Python does for others; to take all libraries apart takes longer than most tests
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((status or 0) & 255)


if __name__ == "__main__":
    main()
