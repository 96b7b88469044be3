"""Pictures of HDR and wide-gamut video as BT.709 pictures.

One fixed curve for all clips, so that a picture depends on nothing but its own pixels:

1. Light. PQ (SMPTE ST 2084) gives nits; HLG (ARIB STD-B67) gives scene light, shown with a system gamma of 1, which is
   BT.2100's for a display of 334 nits; SDR is read as sRGB. 1.0 is reference white: 203 nits in PQ, 75 % in HLG
   (ITU-R BT.2408).
2. Primaries: linear light to those of BT.709; what lies outside of them is cut off at 0.
3. Highlights. Up to ``KNEE`` nothing changes. Above it the largest of red, green and blue is bent so that the peak
   (1000 nits in PQ, a signal of 100 % in HLG) becomes 1, and the other two follow in proportion: the hue stays.
4. Encoding: sRGB, as which every training program reads a picture.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

# Of reference white; 225 of 255 in the finished picture.
KNEE = 0.75
REFERENCE_WHITE_NITS = 203.0
PQ_PEAK_NITS = 1000.0
# Signal values per channel that the curve is tabulated for; the input has 16 bits, video 10 or 12.
SIGNALS = 4096
# Rows that are worked on at a time: a picture of 8K in float32 would need 400 MB for every step.
ROWS = 256

# H.273's numbers of colour primaries -> linear RGB of these to linear RGB of BT.709, D65 white in all of them.
TO_BT709: Mapping[int, np.ndarray] = {
    9: np.array(  # BT.2020
        [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
    ),
    12: np.array(  # Display P3
        [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]]
    ),
}


def linear_light(signal: np.ndarray, transfer: str) -> np.ndarray:
    """Linear light as a multiple of reference white for signal values in [0, 1]. transfer: "PQ", "HLG" or "SDR"."""
    if transfer == "PQ":
        power = signal ** (32 / 2523)
        ratio = np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)
        return 10_000 / REFERENCE_WHITE_NITS * ratio ** (8192 / 1305)
    if transfer == "HLG":
        return _hlg(signal) / _hlg(np.array(0.75))
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _hlg(signal: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def peak_of(transfer: str) -> float:
    """The light that becomes white, as a multiple of reference white; 1 for SDR, which is not bent at all."""
    if transfer == "PQ":
        return PQ_PEAK_NITS / REFERENCE_WHITE_NITS
    return float(linear_light(np.array(1.0), transfer))


def bend(light: np.ndarray, peak: float) -> np.ndarray:
    """Light above ``KNEE`` squeezed below 1, smoothly and in order; light at ``peak`` and above becomes 1."""
    over = np.maximum(np.minimum(light, peak) - KNEE, 0) / (1 - KNEE)
    most = (peak - KNEE) / (1 - KNEE)
    return np.where(light <= KNEE, light, KNEE + (1 - KNEE) * over * (1 + over / most**2) / (1 + over))


@lru_cache
def _tables(transfer: str) -> tuple[np.ndarray, np.ndarray]:
    light = linear_light(np.linspace(0, 1, SIGNALS), transfer).astype(np.float32)
    # By the square root of the light: equal steps there are nearly equal steps for the eye.
    wanted = np.linspace(0, 1, SIGNALS) ** 2
    encoded = np.where(wanted <= 0.0031308, 12.92 * wanted, 1.055 * wanted ** (1 / 2.4) - 0.055)
    return light, np.round(255 * encoded).astype(np.uint8)


def to_bt709(picture: np.ndarray, transfer: str, primaries: int) -> np.ndarray:
    """uint8 BT.709 (height, width, 3) of a uint16 RGB signal (height, width, 3), full range.

    transfer: "PQ", "HLG" or "SDR". primaries: H.273's number; those that ``TO_BT709`` lacks are taken as they are.
    """
    light_of, code_of = _tables(transfer)
    peak, matrix = peak_of(transfer), TO_BT709.get(primaries)
    result = np.empty(picture.shape, dtype=np.uint8)
    for top in range(0, len(picture), ROWS):
        light = light_of[(picture[top : top + ROWS].astype(np.uint32) * (SIGNALS - 1) + 32767) // 65535]
        if matrix is not None:
            light = light @ matrix.T.astype(np.float32)
        np.maximum(light, 0, out=light)
        if peak > 1:
            largest = light.max(axis=-1)
            bright = largest > KNEE
            light[bright] *= (bend(largest[bright], peak) / largest[bright])[:, None].astype(np.float32)
        np.minimum(light, 1, out=light)
        result[top : top + ROWS] = code_of[np.rint(np.sqrt(light) * (SIGNALS - 1)).astype(np.intp)]
    return result
