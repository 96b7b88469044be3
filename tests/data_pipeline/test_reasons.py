"""Words for what went wrong."""

import av
import pytest

from data_pipeline.errors import ClipError
from data_pipeline.models.video_index import open_container
from data_pipeline.reasons import one_line


def test_an_error_is_told_in_one_line_of_some_length():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert len(one_line(ValueError("x" * 500))) == 200


@pytest.mark.parametrize("level", [None, av.logging.ERROR])
def test_a_broken_file_is_told_alike_whoever_listens_to_ffmpeg(tmp_path, level):
    """With its log switched on, as some libraries do for all, PyAV adds the log's last line to every error."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(bytes(range(256)) * 8)
    before = av.logging.get_level()
    av.logging.set_level(level)
    try:
        with pytest.raises(ClipError) as caught:
            open_container(path)
    finally:
        av.logging.set_level(before)
    error = caught.value.evidence["error"]
    assert error.startswith("InvalidDataError: [Errno")
    assert error.endswith("clip.mp4'")
