import io
import re
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

import msdiffusion.request.pictures
from msdiffusion.errors import LayoutError, RequestError
from msdiffusion.request.pictures import VISIBLE, open_content, open_reference, open_upright
from msdiffusion.request.request import check_request

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
"""Every grey once."""


def file_of(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_a_file_that_is_no_picture(tmp_path):
    for name, content in (("text.png", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match="not a picture"):
            open_reference(tmp_path / name)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("RGB", "RGB"), ("RGBA", "RGBA"), ("L", "RGB"), ("LA", "RGBA"), ("1", "RGB"), ("CMYK", "RGB")],
)
def test_references_of_any_mode(tmp_path, mode, expected):
    assert open_reference(Image.new(mode, (4, 4), "white")).mode == expected


def test_a_photo_taken_upright_stands_upright(tmp_path):
    sideways = Image.new("RGB", (8, 4), "white")
    sideways.paste("black", (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    for name in ("photo.png", "photo.webp", "photo.tiff"):
        sideways.save(tmp_path / name, exif=exif, lossless=True)
        for picture in (tmp_path / name, Image.open(tmp_path / name)):
            opened = open_reference(picture)
            assert opened.size == (4, 8)
            assert opened.getpixel((1, 0)) == (0, 0, 0)
            assert opened.getpixel((1, 7)) == (255, 255, 255)


def test_references_from_files_keep_their_transparency(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "cut_out.png")
    opened = open_reference(tmp_path / "cut_out.png")
    assert opened.mode == "RGBA"
    assert opened.getpixel((0, 0)) == (1, 2, 3, 4)
    assert open_reference(str(tmp_path / "cut_out.png")).mode == "RGBA"


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (RAMP.astype(np.uint16) * 257, "I;16"),
        (RAMP.astype(np.int32) * 257, "I"),
        (RAMP.astype(np.int32), "I"),  # 8 bits in a wide array, as sums and masks come
        (RAMP.astype(np.uint16), "I;16"),
        (RAMP.astype(np.float32) / 255, "F"),
        (RAMP.astype(np.float32), "F"),
    ],
)
def test_grey_pictures_of_more_bits_keep_their_greys(tmp_path, values, mode):
    picture = Image.fromarray(values)
    assert picture.mode == mode
    assert np.array_equal(np.asarray(open_reference(picture)), np.repeat(RAMP[..., None], 3, 2))
    picture.save(tmp_path / "grey.tiff")
    assert np.array_equal(np.asarray(open_reference(tmp_path / "grey.tiff"))[..., 0], RAMP)


def test_a_grey_png_of_16_bits_with_a_transparent_grey(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "grey.png", transparency=257 * 7)
    opened = open_reference(tmp_path / "grey.png")
    assert opened.mode == "RGBA"
    assert np.array_equal(np.asarray(opened)[..., 3], np.where(RAMP == 7, 0, 255))
    assert np.array_equal(np.asarray(opened)[..., 1], RAMP)


@pytest.mark.parametrize("bits", [10, 12, 13])
def test_grey_of_fewer_bits_in_a_file_of_16_is_told(bits, recwarn):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    open_reference(Image.fromarray(values), "dog")
    assert [f"up to {2**bits - 1} of 65535" in str(each.message) for each in recwarn] == ([True] if bits < 13 else [])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array([[-1, 5]], np.int32), "from -1 to 5.*scale it to 0 to 65535"),
        (np.array([[0, 70000]], np.int32), "from 0 to 70000"),
        (np.array([[0, 1000]], np.float32), "from 0 to 1000.*scale it to 0 to 1,"),
        (np.array([[-0.5, 0.5]], np.float32), "from -0.5 to 0.5"),
        (np.array([[0, 1.02]], np.float32), "from 0 to 1.02.*scale it to 0 to 1,"),  # after a resize by Lanczos
        (np.array([[0, np.nan]], np.float32), "nan"),
        (np.array([[0, np.inf]], np.float32), "inf"),
    ],
)
def test_grey_pictures_without_a_known_range_are_refused(values, told):
    with pytest.raises(RequestError, match=f"image is a grey picture with values {told}|{told}.*not known"):
        open_reference(Image.fromarray(values))


def test_a_mask_of_16_bits_is_a_mask():
    mask = RAMP > 100
    for values in (mask.astype(np.uint16) * 65535, mask.astype(np.int32) * 255, mask.astype(np.float32)):
        request = check_request([Image.new("RGB", (4, 4))], None, "a dog", ["dog"], masks=[Image.fromarray(values)])
        assert np.array_equal(request.subjects.masks[0], mask)


def profile(gamma=2.2, primaries=((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))):
    """An ICC profile: Adobe RGB by default, from its primaries (x, y), with white D65, by Bradford's matrix to D50."""

    def xyz(x, y):
        return np.array([x / y, 1, (1 - x - y) / y])

    white, d50 = xyz(0.3127, 0.3290), np.array([0.96422, 1.0, 0.82521])
    columns = np.stack([xyz(*primary) for primary in primaries], 1)
    matrix = columns * np.linalg.solve(columns, white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    matrix = np.linalg.inv(bradford) @ np.diag((bradford @ d50) / (bradford @ white)) @ bradford @ matrix

    def fixed(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 6) + b"Wide\0\0" + bytes(78)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": text, b"wtpt": b"XYZ \0\0\0\0" + fixed(d50), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(column), name + b"TRC": curve}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(">I4xI", 0, 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(d50)
    header += bytes(128 - len(header))
    whole = header + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def wide_to_srgb(values, gamma=2.2):
    """Adobe RGB (n, 3) uint8 to sRGB by its published matrices."""
    to_xyz = np.array([[0.5767309, 0.1855540, 0.1881852], [0.2973769, 0.6273491, 0.0752741],
                       [0.0270343, 0.0706872, 0.9911085]])  # fmt: skip
    from_xyz = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560],
                         [0.0556434, -0.2040259, 1.0572252]])  # fmt: skip
    linear = np.clip((values / 255) ** gamma @ to_xyz.T @ from_xyz.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


COLOURS = np.array([[200, 120, 90], [90, 140, 200], [128, 128, 128], [60, 160, 70], [255, 255, 255], [0, 0, 0]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_colour_profile_is_applied(kind):
    picture = Image.fromarray(COLOURS.astype(np.uint8)[None])
    content = file_of(picture, kind, icc_profile=profile(), **({"lossless": True} if kind == "WEBP" else {}))
    for given in (Image.open(io.BytesIO(content)), open_content(content, "it")):
        opened = open_reference(given)
        assert opened.info == {}
        found = np.asarray(opened)[0].astype(float)
        assert abs(found - wide_to_srgb(COLOURS)).max() <= 2
        assert abs(found - COLOURS).max() > 10
    again = open_reference(opened)
    assert np.array_equal(np.asarray(again), np.asarray(opened))


def test_a_cut_out_and_a_palette_with_a_profile():
    values = np.concatenate([COLOURS, np.array([255, 0, 128, 1, 7, 255])[:, None]], 1).astype(np.uint8)
    found = np.asarray(
        open_reference(Image.open(io.BytesIO(file_of(Image.fromarray(values[None]), icc_profile=profile()))))
    )
    assert np.array_equal(found[0, :, 3], values[:, 3])
    assert abs(found[0, :, :3] - wide_to_srgb(COLOURS)).max() <= 2
    palette = Image.fromarray(COLOURS.astype(np.uint8)[None]).quantize(8)
    found = np.asarray(open_reference(Image.open(io.BytesIO(file_of(palette, icc_profile=profile())))))
    assert abs(found[0] - wide_to_srgb(COLOURS)).max() <= 3


def test_srgb_by_any_name_changes_no_pixel():
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for content in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),):
        given = Image.open(io.BytesIO(file_of(Image.fromarray(values), icc_profile=content)))
        assert np.array_equal(np.asarray(open_reference(given)), values)


@pytest.mark.parametrize("broken", [b"none", profile()[:200], b"\0" * 400])
def test_a_profile_that_cannot_be_used_is_told(broken):
    picture = Image.fromarray(COLOURS.astype(np.uint8)[None])
    picture.info["icc_profile"] = broken
    with pytest.warns(UserWarning, match="image: its colour profile cannot be used .*taken for sRGB"):
        opened = open_reference(picture)
    assert np.array_equal(np.asarray(opened)[0], COLOURS)


def test_a_profile_of_other_colours_than_the_picture_has_is_told():
    picture = Image.fromarray(COLOURS.astype(np.uint8)[None])
    grey = bytearray(profile())
    grey[16:20] = b"GRAY"
    picture.info["icc_profile"] = bytes(grey)
    with pytest.warns(UserWarning, match="its colour profile cannot be used"):
        open_reference(picture)


def test_a_grey_picture_with_a_profile_of_colours():
    picture = Image.fromarray(RAMP)
    picture.info["icc_profile"] = profile(gamma=1.0)
    opened = np.asarray(open_reference(picture)).astype(int)
    assert opened[8, 0].tolist() == pytest.approx([188] * 3, abs=2)  # 128 of 255, linear


def test_an_alpha_channel_of_zeros_and_ones_is_refused():
    """As segmentation gives masks: everything would be as good as transparent."""
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = np.arange(64).reshape(8, 8) % 2
    with pytest.raises(RequestError, match=r"dog is nearly transparent \(alpha is 1 of 255 at most\)"):
        open_reference(Image.fromarray(pixels), "dog")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_a_cut_out_that_is_wholly_transparent_is_refused(mode):
    with pytest.raises(RequestError, match=r"dog is wholly transparent.*255 on the subject"):
        open_reference(Image.new("RGBA", (4, 4), (9, 9, 9, 0)).convert(mode), "dog")
    one = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    one.putpixel((1, 1), (9, 9, 9, VISIBLE))
    assert open_reference(one).mode == "RGBA"


def exif_bytes(*entries, start=b"II*\0\x08\0\0\0"):
    """An EXIF block of entries (tag, type, count, four bytes)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + start + struct.pack("<H", len(entries)) + body + bytes(4)


TURN = (0x0112, 3, 1, b"\6\0\0\0")
DAMAGED_EXIF = {
    "no header": b"Exif\0\0garbage garbage garbage",
    "empty": b"Exif\0\0",
    "half a header": b"Exif\0\0II",
    "offset beyond the end": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "cut off": exif_bytes(TURN)[:20],
    "more entries than there are": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(20),
    "unknown type": exif_bytes((0x0112, 99, 1, b"\6\0\0\0")),
    "orientation as text": exif_bytes((0x0112, 2, 4, b"six\0")),
    "orientation 9": exif_bytes((0x0112, 3, 1, b"\x09\0\0\0")),
    "rational without denominator": exif_bytes((0x011A, 5, 1, b"\xf0\0\0\0")),
    "thumbnail into nowhere": exif_bytes((0x8769, 4, 1, b"\xff\xff\xff\x7f")),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", DAMAGED_EXIF)
def test_damaged_exif_data_leave_the_pixels_alone(tmp_path, damage, kind, recwarn):
    content = file_of(Image.new("RGB", (12, 8), (200, 30, 60)), kind, exif=DAMAGED_EXIF[damage])
    (tmp_path / "photo").write_bytes(content)
    opened = Image.open(io.BytesIO(content))
    recwarn.clear()  # pillow tells whoever opens it themselves
    for given in (tmp_path / "photo", opened, open_content(content, "it")):
        assert open_reference(given).size == (12, 8)
    assert not recwarn.list


def test_a_picture_of_many_pixels_is_read_without_a_word(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.new("RGB", (12, 8)).save(tmp_path / "many.png")
    assert open_reference(tmp_path / "many.png").size == (12, 8)
    assert not recwarn.list


def test_threads_that_decode_together_leave_the_filters_of_warnings_alone(monkeypatch, in_threads):
    first_in, second_in, first_left = threading.Event(), threading.Event(), threading.Event()

    def slow(picture, name, notes):
        (first_in if name == "first" else second_in).set()
        (second_in if name == "first" else first_left).wait(0.2)
        return picture

    def first():
        open_upright(Image.new("RGB", (2, 2)), "first")
        first_left.set()

    def second():
        first_in.wait(1)
        open_upright(Image.new("RGB", (2, 2)), "second")

    monkeypatch.setattr(msdiffusion.request.pictures, "_upright", slow)
    before = list(warnings.filters)
    in_threads(first, second)
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_width_as_text_does_not_stop_the_turn(tmp_path, kind):
    content = file_of(
        Image.new("RGB", (12, 8)), kind, exif=exif_bytes((0x0100, 2, 4, b"abc\0"), (0x0101, 2, 4, b"abc\0"), TURN)
    )
    (tmp_path / "photo").write_bytes(content)
    assert open_reference(tmp_path / "photo").size == (8, 12)
    assert open_reference(Image.open(tmp_path / "photo")).size == (8, 12)


def png_of_size(width, height):
    """The header of a PNG that says so; nothing behind it."""
    content = bytearray(file_of(Image.new("1", (1, 1))))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_too_many_pixels_are_refused_in_our_words(tmp_path):
    (tmp_path / "huge.png").write_bytes(png_of_size(19000, 10000))
    with pytest.raises(
        RequestError, match=r"dog: '.*huge.png' has more than 110,000,000 pixels.*make it smaller"
    ) as told:
        open_reference(tmp_path / "huge.png", "dog")
    assert "bomb" not in str(told.value)
    for width in (19000, 14000):  # the library's own limit, and ours
        with pytest.raises(RequestError, match="more than 110,000,000 pixels"):
            open_content(png_of_size(width, 10000), "it")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_picture_of_very_many_pixels_is_reduced_by_a_whole_factor(mode, transparent, monkeypatch):
    colours = [3, 200] if mode in ("P", "I", "I;16") else [0, 255] if mode in ("1", "L") else [0.25, 0.5]
    if mode in Image.MODES and len(Image.new(mode, (1, 1)).getbands()) > 1:
        bands = len(Image.new(mode, (1, 1)).getbands())
        colours = [(40, 50, 60, 255)[:bands], (200, 220, 240, 128)[:bands]]
    picture = Image.new(mode, (150, 2000), colours[0])
    picture.paste(colours[1], (0, 1200, 150, 2000))
    if mode == "P":
        picture.putpalette([*range(256)] * 3)
    if transparent and mode in ("L", "P", "RGB", "I;16"):
        picture.info["transparency"] = picture.getpixel((0, 0))
    whole = open_upright(picture)
    monkeypatch.setattr(msdiffusion.request.pictures, "MAX_KEPT_PIXELS", 10_000)
    reduced = open_upright(picture)
    assert reduced.size == (25, 334)  # by 6: the lowest row is of 2 rows only
    assert reduced.has_transparency_data == whole.has_transparency_data
    # in premultiplied alpha: colours that show nothing may change
    modes = ("RGBA", "RGBa") if whole.has_transparency_data else (reduced.mode, reduced.mode)
    found, wanted = (np.asarray(each.convert(modes[0]).convert(modes[1]), int) for each in (reduced, whole))
    assert abs(found[:, 7] - wanted[::6, 7]).max() <= 1


def broken_files():
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "TGA", "ICO"):
        whole = file_of(picture, kind)
        yield f"{kind} cut off", whole[: len(whole) // 2]
        yield f"{kind} of its first bytes", whole[:30]
    yield "text", b"hello"
    yield "PNG with other chunks", file_of(picture)[:8] + bytes(100)


READ_ALL_THE_SAME = ("TGA cut off", "PPM of its first bytes", "GIF cut off")
BROKEN = {name: content for name, content in broken_files() if name not in READ_ALL_THE_SAME}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_our_words(tmp_path, name):
    (tmp_path / "dog.bin").write_bytes(BROKEN[name])
    told = r"image: '.*dog\.bin' is not a picture that can be read: .+|it is not a picture that can be read: .+"
    for function in (lambda: open_reference(tmp_path / "dog.bin"), lambda: open_content(BROKEN[name], "it")):
        with pytest.raises(RequestError) as error:
            function()
        assert re.fullmatch(told, str(error.value))


def test_random_damage_never_gets_past_us():
    random = np.random.default_rng(7)
    picture = Image.effect_noise((24, 16), 80).convert("RGB")
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
            whole = np.frombuffer(file_of(picture, kind), np.uint8)
            for _ in range(60):
                content = whole.copy()
                places = random.integers(0, len(content), 12)
                content[places] = random.integers(0, 256, 12)
                try:
                    open_reference(open_content(content.tobytes(), "it"))
                except RequestError:
                    refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "the file is empty"),
        (b"hello", "it is in none of the formats that are read: JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, as telephones write it: export it as JPEG or PNG"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is a drawing in SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ],
)
def test_what_a_file_is_instead_is_told(tmp_path, content, told):
    (tmp_path / "dog.jpg").write_bytes(content)
    with pytest.raises(RequestError, match=told):
        open_reference(tmp_path / "dog.jpg")


@pytest.mark.parametrize(
    "address", ["https://example.org/dog.png", "http://x/y", "s3://bucket/dog.png", "file:///dog.png"]
)
def test_an_address_is_no_file(address):
    with pytest.raises(RequestError, match=r"images\[0\] is the address '.*'; nothing is downloaded: save the picture"):
        check_request([address], None, "a dog", ["dog"])


def test_other_things_are_no_picture(tmp_path):
    with pytest.raises(RequestError, match="is a folder: give the file of one picture"):
        open_reference(tmp_path)
    with pytest.raises(RequestError, match=r"got ndarray: PIL.Image.fromarray\(array\)"):
        open_reference(np.zeros((4, 4, 3)))
    closed = Image.open(io.BytesIO(file_of(Image.new("RGB", (4, 4)))))
    closed.close()
    with pytest.raises(RequestError, match="image is not a picture that can be read"):
        open_reference(closed)
    with pytest.raises(RequestError, match="not a picture that can be read"):
        open_reference(Image.open(io.BytesIO(BROKEN["JPEG cut off"])))


def test_a_mask_with_a_profile_is_read_as_stored():
    mask = Image.fromarray(RAMP > 100).convert("L")
    mask.info["icc_profile"] = profile()
    request = check_request([Image.new("RGB", (4, 4))], None, "a dog", ["dog"], masks=[mask])
    assert np.array_equal(request.subjects.masks[0], RAMP > 100)
    grey = Image.new("L", (4, 4), 100)
    with pytest.raises(LayoutError, match="other colours"):
        check_request([Image.new("RGB", (4, 4))], None, "a dog", ["dog"], masks=[grey])


def test_tiff_with_tags_of_other_types_is_refused_or_read(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[305] = "a program"
    Image.new("RGB", (6, 4)).save(tmp_path / "a.tiff", tiffinfo=tags)
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    place = content.find(struct.pack("<HH", 256, 4))
    place = place if place >= 0 else content.find(struct.pack("<HH", 256, 3))
    content[place + 2] = 2  # the width as text
    with pytest.raises(RequestError, match="it is not a picture that can be read"):
        open_content(bytes(content), "it")
