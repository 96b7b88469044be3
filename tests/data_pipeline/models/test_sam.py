import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.sam import RELEASED, SamParams, SamSegmenter, build_sam, load_sam
from data_pipeline.records import Frame
from data_pipeline.steps.segment_masks import SegmentMasks

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
    model, weights, tensors = folder / "tiny.json", folder / "tiny.pth", folder / "tiny.safetensors"
    model.write_text(json.dumps(TINY))
    state = build_sam(SamParams(**{**TINY, "global_attention": (1,)})).state_dict()
    torch.save(state, weights)
    save_file(state, tensors)
    return model, weights, tensors


@pytest.fixture
def frame():
    return Frame(index=0, time=0.0, image=np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def detections(make_detection, *boxes):
    mask = np.ones((60, 90), dtype=bool)
    return tuple(replace(make_detection(mask, box=box), mask=None) for box in boxes)


def segmenter_of(files, **options):
    return SamSegmenter(load_sam(str(files[0]), files[1], "cpu"), **options)


def noise(height, width, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Frame(index=seed, time=0.0, image=picture)


def test_one_mask_per_box_the_same_alone_and_together(files, frame, make_detection):
    segmenter = segmenter_of(files)
    both = detections(make_detection, (0.1, 0.2, 0.6, 0.9), (0.5, 0.0, 1.0, 0.5))
    [together] = segmenter.segment([(frame, both)])
    for found, alone in zip(together, both, strict=True):
        [[single]] = segmenter.segment([(frame, (alone,))])
        assert found.mask.shape == (60, 90)
        assert found.mask.dtype == bool
        assert np.array_equal(found.mask, single.mask)
        assert 0 <= found.mask_score <= 1
        assert found.box == alone.box


def test_a_batch_of_frames_gives_what_the_package_predicts_one_by_one(files, make_detection):
    """Scores differ by rounding only (float32 sums in another order); masks by the pixels whose logit is within
    rounding of the threshold: one in a thousand is allowed.
    """
    from segment_anything import SamPredictor

    frames = [noise(60, 90, 1), noise(90, 60, 2), noise(200, 130, 3)]
    boxes = [[(0.1, 0.2, 0.6, 0.9), (0.5, 0.0, 1.0, 0.5)], [(0.0, 0.0, 1.0, 1.0)], [(0.3, 0.3, 0.4, 0.4)] * 3]
    requests = [(one, detections(make_detection, *some)) for one, some in zip(frames, boxes, strict=True)]
    sam = load_sam(str(files[0]), files[1], "cpu")
    predictor = SamPredictor(sam)
    for (one, asked), found in zip(requests, SamSegmenter(sam).segment(requests), strict=True):
        predictor.set_image(one.image)
        height, width = one.image.shape[:2]
        for detection, filled in zip(asked, found, strict=True):
            box = np.array(detection.box, dtype=np.float32) * np.float32([width, height, width, height])
            masks, quality, _ = predictor.predict(box=box, multimask_output=False)
            assert filled.mask_score == pytest.approx(float(np.clip(quality[0], 0, 1)), abs=1e-5)
            assert (filled.mask != masks[0]).mean() <= 0.001
    assert len({filled.mask.tobytes() for filled in found}) == 1  # the same box thrice


def test_a_frame_is_encoded_once_and_one_without_boxes_not_at_all(files, frame, make_detection):
    segmenter = segmenter_of(files, frames_per_batch=2)
    encoded = []
    segmenter._sam.image_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    [box] = detections(make_detection, (0.1, 0.2, 0.6, 0.9))
    requests = [(frame, (box,)), (noise(9, 9, 1), ()), (frame, (box, box)), (noise(9, 9, 2), (box,))]
    found = segmenter.segment([*requests, (noise(9, 9, 3), (box,))])
    assert encoded == [2, 1]
    assert [len(filled) for filled in found] == [1, 0, 2, 1, 1]
    assert np.array_equal(found[0][0].mask, found[2][1].mask)


def test_no_boxes(files, frame):
    segmenter = segmenter_of(files)
    assert segmenter.segment([(frame, ())]) == [()]
    assert segmenter.segment([]) == []


def test_safetensors_and_pytorch_files_hold_the_same(files):
    first, second = (load_sam(str(files[0]), weights, "cpu").state_dict() for weights in files[1:])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frames_per_batch_is_positive(files):
    with pytest.raises(SettingsError, match="frames_per_batch must be at least 1, got 0"):
        segmenter_of(files, frames_per_batch=0)


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
    with pytest.raises(
        InputError, match=r"are not those of vit_b: .*its files lack image_encoder(?s:.*)Do --segmenter"
    ):
        load_sam("vit_b", files[1], "cpu")
    for name, message in (("broken.pth", "is not a file of tensors only"), ("broken.safetensors", "not a safetensors")):
        broken = tmp_path / name
        broken.write_bytes(b"not weights")
        with pytest.raises(InputError, match=message):
            load_sam(str(files[0]), broken, "cpu")
    other = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    with pytest.raises(InputError, match="'model' is a dict: needed are tensors by name"):
        load_sam(str(files[0]), other, "cpu")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", InputError, r"sizes\.json is not JSON"),
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
