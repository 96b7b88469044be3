"""How many pictures are in a packet of MPEG-4 part 2, read from its start codes, without decoding.

DivX and XviD put a B-frame into the packet of the picture that is shown after it ("packed bitstream"), because AVI has
one packet per tick of the clock; a picture that is not coded stands in its old place. They also write pictures that are
not coded where nothing has changed. No decoder gives a picture for either.
"""

import re
from collections.abc import Sequence

PACKED = re.compile(rb"DivX\d+(?:Build|b)\d+p")
PICTURE = b"\x00\x00\x01\xb6"
LAYER = re.compile(rb"\x00\x00\x01[\x20-\x2f]")
# Larger packets hold a coded picture; FFmpeg's own bit stream filter for packed streams has the same limit.
MAX_NOT_CODED = 19


def is_packed(header: bytes) -> bool:
    """Whether these bytes, a stream's header or first key frame, say that B-frames are packed."""
    return PACKED.search(header) is not None


def clock_bits(header: bytes) -> int | None:
    """Bits that tell the time of a picture within its second; None if the bytes have no header of a layer."""
    found = LAYER.search(header)
    if found is None:
        return None
    bits = "".join(f"{byte:08b}" for byte in header[found.end() : found.end() + 32])
    at = 9  # random access, kind of object
    at += 8 if bits[at : at + 1] == "1" else 1  # version and priority
    at += 20 if bits[at : at + 4] == "1111" else 4  # shape of a pixel
    controls = bits[at : at + 5]
    at += 1 if controls[:1] == "0" else 84 if controls.endswith("1") else 5  # sizes of buffers
    at += 3  # shape of the layer, a marker
    ticks = bits[at : at + 16]
    return max(1, (int(ticks, 2) - 1).bit_length()) if len(ticks) == 16 else None


def is_coded(packet: bytes, clock: int | None) -> bool:
    """False for a packet whose only picture is not coded. clock: see ``clock_bits``; None says that all are."""
    place = packet.find(PICTURE)
    if clock is None or place < 0 or len(packet) > MAX_NOT_CODED:
        return True
    bits = "".join(f"{byte:08b}" for byte in packet[place + len(PICTURE) :])
    seconds = bits.find("0", 2)  # after the kind of the picture: a 1 per second, then 0
    coded = seconds + 1 + 1 + clock + 1  # a marker on either side of the clock
    return seconds < 0 or bits[coded : coded + 1] != "0"


def pictures_in(packets: Sequence[bytes | None], header: bytes) -> list[int]:
    """How many pictures a decoder gives for each packet, the ones held back included. packets: None for one that is
    too large not to be coded, in a stream that is not packed.
    """
    clock, packed = clock_bits(header), is_packed(header)
    return [
        1 if data is None else (data.count(PICTURE) if packed else 1) - (not is_coded(data, clock)) for data in packets
    ]
