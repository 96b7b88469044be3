import ast
import io
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from data_pipeline.picture_formats import FORMATS, open_listed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", FORMATS)
def test_listed_formats_open_whatever_their_name(tmp_path, kind):
    path = tmp_path / "picture.txt"
    Image.new("RGB", (8, 6), "red").save(path, kind)
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        with open_listed(source) as picture:
            assert (picture.format, picture.size) == (kind, (8, 6))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "EPS", "PDF", "PCX", "SGI", "JPEG2000", "DDS", "IM", "MSP"])
def test_other_formats_are_refused_with_the_list(tmp_path, kind):
    path = tmp_path / "picture.jpg"
    Image.new("1" if kind == "MSP" else "RGB", (16, 16)).save(path, kind)
    with pytest.raises(UnidentifiedImageError, match="JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF"):
        open_listed(path)


def calls_of_open(source: str) -> list[int]:
    """Lines that call Image.open without saying which formats."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr, getattr(node.func.value, "id", "")) == ("open", "Image")
        and not any(keyword.arg == "formats" for keyword in node.keywords)
    ]


def test_pictures_are_opened_in_one_place():
    found = {
        str(path.relative_to(ROOT)): lines
        for package in ("msdiffusion", "data_pipeline")
        for path in (ROOT / package).rglob("*.py")
        if (lines := calls_of_open(path.read_text()))
    }
    assert found == {}, "use data_pipeline.picture_formats.open_listed"
    assert calls_of_open("from PIL import Image\nImage.open(path)") == [2]
