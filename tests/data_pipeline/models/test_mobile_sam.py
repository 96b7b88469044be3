import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.detector import AnnotationDetector, Question
from data_pipeline.models.mobile_sam import (
    MobileSamParams,
    build_mobile_sam,
    load_mobile_sam,
    our_name,
    read_mobile_params,
)
from data_pipeline.models.sam import SamSegmenter
from data_pipeline.records import AnnotatedObject, Annotations, DetectedPair, Detection, Entity, Frame
from data_pipeline.steps.segment_masks import SegmentMasks

TINY = {
    "widths": [8, 12, 16],
    "depths": [1, 1, 1],
    "heads": [1, 2, 2],
    "window_sizes": [7, 7, 3],
    "image_size": 64,
    "prompt_width": 16,
    "decoder_mlp_width": 32,
}


def released_name(name):
    """Our name of a tensor -> the released checkpoint's, written independently of ``our_name``."""
    if ".trunk." not in name:
        return name
    name = name.replace(".trunk.", ".").replace(".conv.", ".c.")
    name = name.replace("patch_embed.conv1", "patch_embed.seq.0").replace("patch_embed.conv2", "patch_embed.seq.2")
    merging = re.match(r"(image_encoder)\.stages\.(\d+)\.(downsample\..*)", name)
    if merging:
        return f"{merging[1]}.layers.{int(merging[2]) - 1}.{merging[3]}"
    return name.replace(".stages.", ".layers.")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mobile")
    model, weights = folder / "tiny.json", folder / "tiny.pt"
    model.write_text(json.dumps(TINY))
    torch.manual_seed(0)
    state = build_mobile_sam(read_mobile_params(str(model))).state_dict()
    released = {released_name(name): value for name, value in state.items()}
    # The classifier of the pre-training, which every released file has.
    released |= {
        f"image_encoder.{layer}.{kind}": torch.zeros(3)
        for layer in ("head", "norm_head")
        for kind in ("weight", "bias")
    }
    torch.save(released, weights)
    save_file(released, weights.with_suffix(".safetensors"))
    return model, weights, state


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_in_the_names_of_the_release(files, suffix):
    model, weights, state = files
    loaded = load_mobile_sam(str(model), weights.with_suffix(suffix), "cpu").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_names():
    pairs = {
        "image_encoder.layers.0.downsample.conv1.c.weight": "image_encoder.trunk.stages.1.downsample.conv1.conv.weight",
        "image_encoder.layers.2.blocks.5.attn.qkv.bias": "image_encoder.trunk.stages.2.blocks.5.attn.qkv.bias",
        "image_encoder.patch_embed.seq.2.bn.bias": "image_encoder.trunk.patch_embed.conv2.bn.bias",
        "image_encoder.neck.0.weight": "image_encoder.neck.0.weight",
        "mask_decoder.iou_token.weight": "mask_decoder.iou_token.weight",
    }
    assert {name: our_name(name) for name in pairs} == pairs


def test_features_have_a_sixteenth_of_the_side():
    params = MobileSamParams()
    assert (params.stride, params.image_size // params.stride) == (16, 64)
    with torch.device("meta"):
        sam = build_mobile_sam(params)
        assert sam.image_encoder(torch.empty(2, 3, 1024, 1024)).shape == (2, 256, 64, 64)
    assert 9e6 < sum(value.numel() for value in sam.parameters()) < 11e6


def test_the_step_loads_it_and_gives_masks(files, make_detection):
    step = SegmentMasks(segmenter="mobile-sam", model=str(files[0]), checkpoint=files[1], frames_per_batch=1)
    step.setup()
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    box = replace(make_detection(np.ones((30, 50), dtype=bool), box=(0.1, 0.2, 0.6, 0.9)), mask=None)
    [[found]] = step._segmenter.segment([(Frame(index=0, time=0.0, image=image), (box,))])
    assert found.mask.shape == (30, 50)
    assert found.mask.dtype == bool
    assert 0 <= found.mask_score <= 1


def test_annotated_boxes_without_masks_get_theirs_from_the_segmenter(files, make_pair, make_entity):
    boxes = (AnnotatedObject(object_id=4, name="dog", box=(0.1, 0.1, 0.9, 0.9)),)
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    pair = make_pair(image, image[::-1].copy(), annotations=Annotations(frames={3: boxes, 8: boxes}))
    entities = (make_entity("brown dog"),)
    reference, target = AnnotationDetector().detect(
        [Question(video=pair.video, frame=frame, entities=entities) for frame in (pair.reference, pair.target)]
    )
    detected = DetectedPair(frames=pair, entities=entities, reference=reference, target=target)
    step = SegmentMasks(segmenter="mobile-sam", model=str(files[0]), checkpoint=files[1])
    step.setup()
    step._segmenter._sam.mask_threshold = -1e9  # what random weights draw may be empty
    filled = step.process(detected)
    for found in (*filled.reference, *filled.target):
        assert (found.object_id, found.entity.phrase, found.mask.shape) == (4, "brown dog", (30, 50))
        assert found.mask_score is not None
    without = SegmentMasks(segmenter="annotations")
    without.setup()
    assert without.process(detected).reason == "annotation without a mask"


def test_weights_that_do_not_fit(files):
    with pytest.raises(InputError, match=r"the weights in .*tiny\.pt are not those of MobileSAM vit_t"):
        load_mobile_sam("vit_t", files[1], "cpu")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", InputError, r"sizes\.json is not JSON"),
        ("[]", InputError, r"holds no sizes by name, but \[\]"),
        ('{"width": 3}', InputError, "cannot read the sizes of a MobileSAM from .*TypeError"),
        (json.dumps({**TINY, "depths": [1, 1]}), SettingsError, "need one number per stage"),
        (json.dumps({**TINY, "heads": [1, 5, 2]}), SettingsError, "must be multiples of its heads"),
        (json.dumps({**TINY, "image_size": 100}), SettingsError, "image_size 100 is not a multiple of .* stride 8"),
    ],
)
def test_bad_sizes(tmp_path, content, error, message):
    path = tmp_path / "sizes.json"
    path.write_text(content)
    with pytest.raises(error, match=message):
        read_mobile_params(str(path))


def frame_of(path, number):
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index == number:
                return Frame(index=number, time=0.0, image=frame.to_ndarray(format="rgb24"))
    raise AssertionError(f"no frame {number} in {path}")


@pytest.mark.slow
def test_released_weights_on_real_clips(shared_dir):
    """Masks for the hand-drawn boxes against the given ones. A mask picture holds one object per pixel, so where two
    objects overlap (the ball before the man) it gives the pixel to one of them: hence not all agree completely.
    """
    sam = load_mobile_sam("vit_t", shared_dir / "media/weights/sam/mobile_sam_rebuilt.pt", "cpu")
    videos = shared_dir / "media/videos"
    requests, given = [], []
    for video in json.loads((videos / "captions_and_boxes.json").read_text())["videos"].values():
        sides = np.array([video["width"], video["height"]] * 2)
        for annotated in video.get("annotations", []):
            boxes = [tuple(np.array(found["box_xyxy"]) / sides) for found in annotated["objects"]]
            entity = Entity(phrase="thing", head="thing", mention="thing", position=0)
            asked = tuple(Detection(entity=entity, box=box, score=1.0) for box in boxes)
            requests.append((frame_of(videos / video["file"], annotated["frame"]), asked))
            numbers = np.asarray(Image.open(videos / annotated["mask_png"]))
            given.append([(numbers == found["id"], found["sam_pred_iou"]) for found in annotated["objects"]])
    overlaps = []
    for filled, expected in zip(SamSegmenter(sam, frames_per_batch=1).segment(requests), given, strict=True):
        for found, (mask, score) in zip(filled, expected, strict=True):
            overlaps.append((found.mask & mask).sum() / (found.mask | mask).sum())
            assert found.mask_score == pytest.approx(score, abs=0.01)
    assert len(overlaps) == 21
    assert np.mean(overlaps) >= 0.97
    assert min(overlaps) >= 0.85
