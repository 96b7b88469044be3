#!/usr/bin/env bash
# PyAV: the empty packets that end a demuxing name another stream than the one they belong to.
#
# Container.demux(stream) ends with one packet without content per stream, which tells decoders to give what they hold
# back. Such a packet has the right packet.stream, but packet.stream_index is 0, whatever the stream. In a file whose sound
# comes first, whoever sorts packets by stream_index puts the end of the pictures to the sound (or meets a number that was
# never asked for); by packet.stream.index all is well. Versions: av 18.1.0 (libavformat 62.12), numpy 2.4.6.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import sys
import av
import numpy as np

with av.open(sys.argv[1], "w") as new:
    sound, pictures = new.add_stream("aac", rate=44100), new.add_stream("mpeg4", rate=10)
    pictures.width = pictures.height = 64
    pictures.pix_fmt = "yuv420p"
    for number in range(10):
        picture = np.full((64, 64, 3), 20 * number, np.uint8)
        new.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.rate, silence.pts = 44100, 1024 * number
        new.mux(sound.encode(silence))
    new.mux(pictures.encode())
    new.mux(sound.encode())
with av.open(sys.argv[1]) as old:
    video = old.streams.video[0]
    packets = list(old.demux(video))
full = {(p.stream.index, p.stream_index) for p in packets if p.size}
empty = {(p.stream.index, p.stream_index) for p in packets if not p.size}
print("av", av.__version__, "(stream.index, stream_index) of packets with content", full, "and of empty ones", empty)
assert video.index == 1 and full == {(1, 1)}
assert empty == {(1, 0)}, "empty packets name their own stream now"
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place/sound_first.mp4"
