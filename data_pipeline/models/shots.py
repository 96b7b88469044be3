"""Shot boundaries by PySceneDetect."""

import logging

import numpy as np

from data_pipeline.errors import InputError

try:
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode, SceneDetector, ThresholdDetector
except ImportError as error:
    raise InputError(
        f"opencv cannot be loaded here ({error}): on a machine without libGL, pip uninstall opencv-python, then "
        "pip install opencv-python-headless, which is the same without windows"
    ) from error

# Changes on either side of a frame that its own change is compared with: the library's default.
WINDOW = 2
# The detectors count frames; this rate only turns their numbers into the library's time codes.
RATE = 25.0
# Changes that are smaller than the least one of a cut by more than this are no cut, however they are rounded.
CLOSE = 0.01


def find_cuts(pictures: np.ndarray, *, cut_ratio: float, min_content: float, fade_level: int) -> list[int]:
    """Numbers of the frames that begin a new shot, ascending, each in 1..frames - 1.

    pictures: uint8 RGB (frames, height, width, 3), one small picture per frame. A cut is a frame whose change in hue,
    saturation and value (mean difference, 0 to 255) is at least ``min_content`` and ``cut_ratio`` times the mean of
    the two changes on either side (AdaptiveDetector); or the middle of a stretch of frames whose mean is below
    ``fade_level``, or at least 255 - ``fade_level``, between brighter, or darker, ones (ThresholdDetector; not used at
    0).
    """
    if len(pictures) < 2:
        return []
    # It reports every cut to its log.
    logging.getLogger("pyscenedetect").setLevel(logging.WARNING)
    # Frames that stand still at both ends let the adaptive detector judge the first and the last two frames too.
    still = np.concatenate((pictures[:1].repeat(WINDOW, 0), pictures, pictures[-1:].repeat(WINDOW, 0)))
    found: set[int] = set()
    # Most clips have neither cut nor fade, which is quicker to see at once than frame by frame.
    if changes(pictures).max() > min_content - CLOSE:
        detector = AdaptiveDetector(
            adaptive_threshold=cut_ratio, min_content_val=min_content, window_width=WINDOW, min_scene_len=0
        )
        found = _detect(detector, still)
    method, light = ThresholdDetector.Method, pictures.mean(axis=(1, 2, 3))
    dark, bright = light.min() < fade_level, light.max() >= 255 - fade_level
    sides = ((dark, fade_level, method.FLOOR), (bright, 255 - fade_level, method.CEILING)) if fade_level else ()
    for threshold, side in ((threshold, side) for crossed, threshold, side in sides if crossed):
        found |= _detect(ThresholdDetector(threshold=threshold, method=side, min_scene_len=0), still)
    return sorted(number - WINDOW for number in found if 0 < number - WINDOW < len(pictures))


def changes(pictures: np.ndarray) -> np.ndarray:
    """Mean difference of hue, saturation and value between each picture and the next, as AdaptiveDetector measures it
    but for rounding: float64 (frames - 1,). pictures: see ``find_cuts``, at least two.
    """
    frames, height, width, channels = pictures.shape
    column = cv2.cvtColor(pictures.reshape(frames * height, width, channels), cv2.COLOR_RGB2HSV)
    hsv = column.reshape(pictures.shape).astype(np.int16)
    return np.abs(np.diff(hsv, axis=0)).mean(axis=(1, 2, 3))


def _detect(detector: SceneDetector, pictures: np.ndarray) -> set[int]:
    cuts: set[int] = set()
    for number, picture in enumerate(pictures):
        bgr = np.ascontiguousarray(picture[..., ::-1])
        cuts |= {cut.frame_num for cut in detector.process_frame(FrameTimecode(number, RATE), bgr)}
    return cuts
