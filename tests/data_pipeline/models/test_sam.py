import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.models.sam import RELEASED, SamParams, SamSegmenter, build_sam, load_sam
from data_pipeline.records import Frame, InputError, SettingsError
from data_pipeline.steps.segment_masks import SegmentMasks

pytestmark = pytest.mark.slow
TINY = {
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "global_attention": [1],
    "image_size": 128,
    "window_size": 4,
    "prompt_width": 32,
    "decoder_mlp_width": 64,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    model, weights = folder / "tiny.json", folder / "tiny.pth"
    model.write_text(json.dumps(TINY))
    torch.save(build_sam(SamParams(**{**TINY, "global_attention": (1,)})).state_dict(), weights)
    return model, weights


@pytest.fixture
def frame():
    return Frame(index=0, time=0.0, image=np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def detections(make_detection, *boxes):
    mask = np.ones((60, 90), dtype=bool)
    return tuple(replace(make_detection(mask, box=box), mask=None) for box in boxes)


def test_one_mask_per_box_the_same_alone_and_together(files, frame, make_detection):
    segmenter = SamSegmenter(load_sam(str(files[0]), files[1], "cpu"))
    both = detections(make_detection, (0.1, 0.2, 0.6, 0.9), (0.5, 0.0, 1.0, 0.5))
    together = segmenter.segment(frame, both)
    for found, alone in zip(together, both, strict=True):
        [single] = segmenter.segment(frame, (alone,))
        assert found.mask.shape == (60, 90)
        assert found.mask.dtype == bool
        assert np.array_equal(found.mask, single.mask)
        assert 0 <= found.mask_score <= 1
        assert found.box == alone.box


def test_no_boxes(files, frame):
    assert SamSegmenter(load_sam(str(files[0]), files[1], "cpu")).segment(frame, ()) == ()


def test_the_step_loads_it(files):
    step = SegmentMasks(segmenter="sam", model=str(files[0]), checkpoint=files[1])
    step.setup()
    assert isinstance(step._segmenter, SamSegmenter)


def test_released_sizes_are_those_of_the_package():
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours = build_sam(RELEASED["vit_b"]).state_dict()
        theirs = sam_model_registry["vit_b"]().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_weights_that_do_not_fit_or_are_none(files, tmp_path):
    with pytest.raises(InputError, match=r"are not those of vit_b: [^$]*size mismatch|Unexpected"):
        load_sam("vit_b", files[1], "cpu")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot read SAM weights from"):
        load_sam(str(files[0]), broken, "cpu")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", InputError, "cannot read the sizes of a SAM from"),
        ('{"encoder_width": 48}', InputError, "cannot read the sizes of a SAM from .*KeyError"),
        (json.dumps({**TINY, "encoder_width": 49}), InputError, "must be multiples of its heads"),
        (json.dumps({**TINY, "image_size": 100}), InputError, "image_size 100 is not a multiple of patch_size 16"),
    ],
)
def test_bad_sizes(files, tmp_path, content, error, message):
    path = tmp_path / "sizes.json"
    path.write_text(content)
    with pytest.raises((error, SettingsError), match=message):
        load_sam(str(path), files[1], "cpu")
