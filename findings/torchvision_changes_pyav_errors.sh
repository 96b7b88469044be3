#!/usr/bin/env bash
# Where two libraries meet: importing torchvision changes the words of PyAV's errors, for the whole process.
#
# PyAV keeps FFmpeg's log switched off. torchvision.io of 0.24 switches it on when it is imported (level ERROR, 16), for
# everybody: from then on the text of every av.FFmpegError ends with "; last error log: ...". Whoever writes error texts into
# files, groups failures by them or compares runs (one process that has loaded a detector, workers that have not) gets other
# words for the same broken clip, and other bytes.
# Way round: cut the text at "; last error log: ", or use error.strerror and error.filename.
# Versions: torchvision 0.24.0, torch 2.9.0, av 18.1.0, numpy 2.4.6; Linux. torchvision 0.29 has no reader of videos any more.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.9.0 torchvision==0.24.0 av==18.1.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import sys

import av

if sys.argv[1] == "with":
    import torchvision
with open("clip.mp4", "wb") as file:  # a file that is no video
    file.write(bytes(range(256)) * 8)
try:
    av.open("clip.mp4")
except av.FFmpegError as error:
    print(av.logging.get_level(), error)
PYTHON
cd "$place"
without=$(venv/bin/python show.py without); with=$(venv/bin/python show.py with 2>/dev/null)
printf 'without torchvision: %s\nwith torchvision: %s\n' "$without" "$with"
[[ $without == None* && $without == *"processing input: 'clip.mp4'" ]] || { echo "changed: PyAV's own text"; exit 1; }
[[ $with == 16* && $with == *"; last error log: [mov"*"moov atom not found" ]] \
  || { echo "changed: torchvision leaves PyAV's errors alone"; exit 1; }
