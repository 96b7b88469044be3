"""From a decoded frame to an upright RGB picture: colours, cropping, square pixels, flips and turns.

What the file says about itself is read once (``declared``), without decoding; what a frame says goes before it. A clip
that is nothing out of the ordinary costs one conversion per frame, and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter
from PIL import Image

from data_pipeline.errors import ClipError
from data_pipeline.models.tone_mapping import TO_BT709, to_bt709
from data_pipeline.records import Colours, VideoFacts

BT709, UNSAID, BT2020 = 1, 2, 9
# Matrices of H.273 that can be converted to RGB, and names of those that cannot.
KNOWN_MATRICES = frozenset({0, 1, UNSAID, 4, 5, 6, 7, 9})
KNOWN = "RGB, BT.601, BT.709, BT.2020, FCC or SMPTE 240M"
MATRIX_NAMES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "SMPTE ST 2085", 14: "ICtCp", 15: "IPT-PQ-C2"}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
# Video of this size that does not say its matrix has that of HDTV, as players take it; smaller video that of BT.601.
HD_LINES, HD_COLUMNS = 720, 1280
# Pixels that differ from squares by less are taken for squares: such numbers come from rounding a picture's size.
SQUARE_ENOUGH = Fraction(1, 100)


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """For clips out of the ordinary. hdr: tonemap, reject or keep. interlaced: deinterlace, reject or keep."""

    hdr: str = "tonemap"
    interlaced: str = "deinterlace"


DEFAULT_RULES = PictureRules()


def colours_of(source: Any) -> Colours:
    """What a codec context or a frame says about its colours. ClipError for a matrix that cannot be converted."""
    matrix = int(source.colorspace)
    if matrix not in KNOWN_MATRICES:
        name = MATRIX_NAMES.get(matrix, f"number {matrix} of ITU-T H.273")
        raise ClipError("unknown colour matrix", matrix=name, needed=KNOWN)
    # FFmpeg has 1 for limited and 2 for full range.
    full_range = {1: False, 2: True}.get(int(source.color_range))
    return Colours(
        matrix=matrix, transfer=int(source.color_trc), primaries=int(source.color_primaries), full_range=full_range
    )


def light_of(colours: Colours, rules: PictureRules) -> tuple[str, tuple[str, ...]]:
    """``tone_map`` and ``notes`` of ``VideoFacts``: what light has to be converted to BT.709, and what is said about
    it. ClipError if the clip is HDR and the rules reject that.
    """
    hdr = HDR_TRANSFERS.get(colours.transfer)
    if hdr is None:
        wide = colours.primaries in TO_BT709
        return ("SDR", ("wide gamut, converted to BT.709",)) if wide else ("", ())
    if rules.hdr == "reject":
        raise ClipError("HDR video", transfer=hdr, needed="SDR, or --hdr tonemap")
    return (hdr, ("HDR, tone-mapped",)) if rules.hdr == "tonemap" else ("", ("HDR, kept as it is",))


def shape_notes(aspect: Fraction, crop: tuple[int, int, int, int], mirrored: bool) -> tuple[str, ...]:
    """What is said about the shape of the stored pictures in ``notes`` of ``VideoFacts``."""
    said = {
        "pixels not square, corrected": aspect != 1,
        "cropped as the container says": any(crop),
        "mirrored, flipped upright": mirrored,
    }
    return tuple(note for note, holds in said.items() if holds)


def pixel_aspect_of(stream: Any) -> Fraction:
    """Width of a stored pixel over its height; 1 if nobody says, or next to it."""
    aspect = stream.sample_aspect_ratio
    return aspect if aspect and abs(aspect - 1) >= SQUARE_ENOUGH else Fraction(1)


def description_of(container: Any, stream: Any) -> str:
    """FFmpeg's own description of one stream, lower case: the only place where PyAV shows what a container says about
    turning and cropping, short of decoding a frame. ClipError for Dolby Vision without a picture for others.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        described = container.dumps_format()
    finally:
        av.logging.set_level(level)
    parts = re.split(r"^ *stream #\d+:(\d+)", described.lower(), flags=re.MULTILINE)
    described = dict(zip(parts[1::2], parts[2::2], strict=True)).get(str(stream.index), "")
    # The one kind of Dolby Vision whose pictures nobody can show without it; the codec says nothing about its colours.
    if re.search(r"dovi configuration record:.* profile: 5,", described):
        raise ClipError("unknown colour matrix", matrix="IPT-PQ-C2 of Dolby Vision, profile 5", needed=KNOWN)
    return described


def crop_of(description: str) -> tuple[int, int, int, int]:
    """Pixels that the container (clap in mov, PixelCrop in Matroska) cuts off: left, top, right, bottom."""
    found = re.search(r"frame cropping: (\d+)/(\d+)/(\d+)/(\d+)", description)
    if found is None:
        return (0, 0, 0, 0)
    left, right, top, bottom = map(int, found.groups())
    return (left, top, right, bottom)


def orientation_of(frame: Any) -> tuple[int, bool]:
    """How a decoded frame asks to be shown: degrees anticlockwise, 0, 90, 180 or 270, and whether left and right are
    exchanged before. ClipError if it asks for anything else.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX") if frame.side_data else None
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix)[:20], dtype=np.int32).tolist()
    mirrored = a * d - b * c < 0
    # x' = a x + c y, y' = b x + d y, with y downwards; a mirrored one is what is left after x was turned round.
    turn = (-a, -b, c, d) if mirrored else (a, b, c, d)
    turns = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 90, (-1, 0, 0, -1): 180, (0, 1, -1, 0): 270}
    signs = tuple((value > 0) - (value < 0) for value in turn)
    if signs not in turns:
        raise ClipError("slanted pictures", rotation=frame.rotation, matrix=[a, b, c, d])
    return turns[signs], mirrored


def upright_size(
    stored: tuple[int, int], crop: tuple[int, int, int, int], aspect: Fraction, rotation: int
) -> tuple[int, int]:
    """Width and height of the finished picture; stored: those of the stored one. ClipError if nothing is left."""
    left, top, right, bottom = crop
    width, height = stored[0] - left - right, stored[1] - top - bottom
    if width < 1 or height < 1:
        raise ClipError("nothing left of the picture", stored=list(stored), cut_off=list(crop))
    width = max(1, round(width * aspect))
    return (height, width) if rotation % 180 else (width, height)


def fields_of(facts: VideoFacts) -> VideoFacts:
    """The same facts, of a clip that is interlaced. ClipError if the rule is to reject such clips."""
    if facts.if_interlaced == "reject":
        raise ClipError("interlaced video", needed="progressive video, or --interlaced deinterlace")
    if facts.if_interlaced == "keep":
        return replace(facts, notes=(*facts.notes, "interlaced, kept as it is"))
    return replace(facts, deinterlace=True, notes=(*facts.notes, "interlaced, deinterlaced"))


def may_have_fields(codec: str) -> bool:
    """False for codecs whose frames are whole pictures. In HEVC a picture of an interlaced clip is one field: nothing
    is woven together, so there is nothing to take apart.
    """
    return codec not in {"hevc", "vvc", "av1", "vp8", "vp9", "flv1", "h263", "mpeg1video"}


def deinterlaced(frames: Sequence[Any], which: int) -> Any:
    """``frames[which]`` without comb edges, by FFmpeg's bwdif. frames: that frame and its neighbours in time, decoded
    and in order; it depends on nothing else, so that a frame is the same however it was reached. Frames that are not
    marked as interlaced stay as they are.
    """
    first = frames[0]
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base=1/1000:pixel_aspect=1/1:"
        f"colorspace={int(first.colorspace)}:range={int(first.color_range)}",
    )
    sink = graph.add("buffersink")
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced"), sink)
    graph.configure()
    for frame in frames:
        source.push(frame)
    source.push(None)
    for _ in range(which):
        sink.pull()
    return sink.pull()


def _without(picture: np.ndarray, edges: tuple[int, int, int, int]) -> np.ndarray:
    """A picture without so many pixels on its left, above, on its right and below."""
    if not any(edges):
        return picture
    left, top, right, bottom = edges
    return np.ascontiguousarray(picture[top : len(picture) - bottom, left : picture.shape[1] - right])


class PictureMaker:
    """Makes the pictures of one clip."""

    def __init__(self, facts: VideoFacts) -> None:
        self.facts = facts
        # One converter for all frames: setting one up costs more than using it on a small frame.
        self._converter = VideoReformatter()

    def picture(self, frame: Any) -> np.ndarray:
        """A frame's upright picture, uint8 RGB (height, width, 3), square pixels. ClipError: shaped unlike others."""
        facts, orientation = self.facts, orientation_of(frame)
        if orientation != (facts.rotation, facts.mirrored):
            raise ClipError("pictures that turn", rotation=orientation[0], at_first=facts.rotation)
        picture = _without(self._upright(self._squared(self._rgb(frame))), facts.bars)
        if picture.shape[:2] != (facts.height, facts.width):
            size = [facts.width, facts.height]
            raise ClipError("pictures of different sizes", first=size, later=list(picture.shape[1::-1]))
        return picture

    def thumbnail(self, frame: Any, size: int) -> np.ndarray:
        """The same, squashed to uint8 RGB (size, size, 3); nothing is deinterlaced for it."""
        if any(self.facts.crop):
            small = Image.fromarray(self._squared(self._rgb(frame))).resize((size, size), Image.Resampling.BOX)
            return self._upright(np.asarray(small))
        return self._upright(self._rgb(frame, width=size, height=size))

    def _rgb(self, frame: Any, **size: int) -> np.ndarray:
        said, facts = colours_of(frame), self.facts.colours
        how: dict[str, int] = {}
        if said.matrix == UNSAID and not frame.format.is_rgb:
            if facts.matrix != UNSAID:
                how["src_colorspace"] = facts.matrix
            elif facts.transfer in HDR_TRANSFERS:
                how["src_colorspace"] = BT2020
            elif frame.height >= HD_LINES or frame.width >= HD_COLUMNS:
                how["src_colorspace"] = BT709
        if said.full_range is None and facts.full_range:
            how["src_color_range"] = ColorRange.JPEG
        how["threads"] = 1  # workers are the parallelism; swscale's own threads wait for each other on a busy machine
        if not self.facts.tone_map:
            return self._converter.reformat(frame, format="rgb24", **size, **how).to_ndarray()
        signal = self._converter.reformat(frame, format="rgb48le", **size, **how).to_ndarray()
        # Whoever says PQ or HLG and nothing else means BT.2100, whose primaries and matrix are those of BT.2020.
        primaries = BT2020 if facts.primaries == UNSAID else facts.primaries
        return to_bt709(signal, self.facts.tone_map, primaries)

    def _squared(self, picture: np.ndarray) -> np.ndarray:
        """Without what is cut off, and with square pixels."""
        facts = self.facts
        picture = _without(picture, facts.crop)
        if facts.pixel_aspect == 1:
            return picture
        height, width = picture.shape[:2]
        wide = (max(1, round(width * facts.pixel_aspect)), height)
        return np.asarray(Image.fromarray(picture).resize(wide, Image.Resampling.BICUBIC))

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        # PyAV hands out pictures as stored; rotation counts degrees anticlockwise, as np.rot90 does.
        if self.facts.mirrored:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(np.rot90(picture, self.facts.rotation // 90))
