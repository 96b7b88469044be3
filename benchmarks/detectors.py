"""Seconds per frame of Grounding DINO at its released size, with random weights: the package against transformers.

    python benchmarks/detectors.py --width 640 --height 360 --batches 1 2

Swin-T, 900 queries, six layers of each kind, as in GroundingDINO_SwinT_OGC.py, and a BERT of 12 layers with a small
vocabulary, which takes no time. Random weights take as long as trained ones. No download.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline.models.detector import Question
from data_pipeline.models.grounding import GroundingDetector
from data_pipeline.models.grounding_dino import GroundingDino, build_from_config, read_package_config
from data_pipeline.models.grounding_dino_hf import GroundingDinoHF, load_grounding_dino_hf
from data_pipeline.models.grounding_dino_weights import convert_to_hf
from data_pipeline.records import Entity, Frame

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "dog", "red", "ball", "woman"]


def make_detectors(folder: Path, device: str) -> dict[str, GroundingDetector]:
    """The same random weights in both libraries."""
    import groundingdino
    from transformers import BertConfig

    BertConfig(vocab_size=len(WORDS)).save_pretrained(folder / "text_encoder")
    (folder / "text_encoder/vocab.txt").write_text("\n".join(WORDS))
    (folder / "text_encoder/tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    config = Path(groundingdino.__file__).parent / "config/GroundingDINO_SwinT_OGC.py"
    torch.manual_seed(0)
    package = build_from_config(read_package_config(config), str(folder / "text_encoder"), device)
    torch.save(package.state_dict(), folder / "weights.pth")
    convert_to_hf(config, folder / "weights.pth", str(folder / "text_encoder"), folder / "hf")
    other = load_grounding_dino_hf(str(folder / "hf"), device)
    settings = {"box_threshold": 0.35, "nms_iou": 0.7}
    return {
        "groundingdino": GroundingDino(package.to(device).eval(), **settings),
        "groundingdino-hf": GroundingDinoHF(*other, **settings),
    }


def main() -> None:
    """Prints a Markdown table: detector, frames per pass, wall clock and CPU seconds per frame."""
    parser = argparse.ArgumentParser(description="seconds per frame of Grounding DINO Swin-T with random weights")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="frames per pass")
    parser.add_argument("--image-size", type=int, default=800, help="of the short side")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    entities = tuple(
        Entity(phrase=name, head=name.split()[-1], mention=name, position=0) for name in ("dog", "red ball", "woman")
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (options.height, options.width, 3), dtype=np.uint8)
    question = Question(video=None, frame=Frame(index=0, time=0.0, image=image), entities=entities)
    with tempfile.TemporaryDirectory() as folder:
        detectors = make_detectors(Path(folder), options.device)
    print("| detector | frames per pass | s per frame | CPU s per frame |\n|---|---|---|---|")
    for name, detector in detectors.items():
        detector.preprocessing = detector.preprocessing.resized_to(options.image_size)
        for size in options.batches:
            detector.batch_size = size
            detector.detect([question] * size)  # the first pass sets things up
            start, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            detector.detect([question] * size)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
            print(f"| {name} | {size} | {wall / size:.1f} | {used / size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
