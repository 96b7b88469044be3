#!/usr/bin/env bash
# PyAV: who encodes a clip as AV1 (libsvtav1) as root goes on at real-time priority, and so does all that it starts.
#
# SVT-AV1, which PyAV's wheels bring along, puts its own threads and the thread that opens the encoder under SCHED_FIFO,
# priority 99, wherever it may (root with CAP_SYS_NICE: virtual machines, CI runners, privileged containers). It does not
# take that back when the encoder is closed, and the option lp=1 (one thread) changes nothing. Processes started later
# inherit it. A script that writes one AV1 clip and then trains or mines starves every other process of the machine, even
# the shell; programs that wait by polling starve each other. Other encoders leave the thread alone. Where the
# process may not ask for real time, nothing happens. The policy belongs to the thread: encode in a thread
# of its own, or put the policy back. Versions: av 18.1.0 (SVT-AV1 4.1.0), numpy 2.4.6, Linux.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import os
import subprocess
import sys
import threading

import av
import numpy as np

NAMES = {os.SCHED_OTHER: "other", os.SCHED_FIFO: "fifo", os.SCHED_RR: "round robin"}


def policy():
    return NAMES[os.sched_getscheduler(0)], os.sched_getparam(0).sched_priority


def encode(codec):
    options = {"svtav1-params": "lp=1"} if codec == "libsvtav1" else {}
    with av.open(sys.argv[1], "w") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(4):
            picture = np.full((128, 128, 3), 50 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


def may_be_realtime():
    code = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


before = policy()
for codec in ("libx264", "libx265", "libvpx-vp9"):
    encode(codec)
assert policy() == before
thread = threading.Thread(target=encode, args=("libsvtav1",))
thread.start()
thread.join()
assert policy() == before, "a thread of its own is no way round any more"
encode("libsvtav1")
child = f"import os; print(os.sched_getscheduler(0) == {os.SCHED_FIFO})"
inherited = subprocess.check_output([sys.executable, "-c", child], text=True).strip()
print("av", av.__version__, "before", before, "after an AV1 clip", policy(), "inherited by a new process:", inherited)
if may_be_realtime():
    assert policy() == ("fifo", 99) and inherited == "True", "the caller keeps its policy now"
else:
    assert policy() == before, "real time without leave to ask for it?"
    print("this process may not ask for real time (run as root with CAP_SYS_NICE to see more)")
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/clip.mkv" 2>&1 | grep -v -e "^Svt" -e x265
