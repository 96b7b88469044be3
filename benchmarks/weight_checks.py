"""What it costs to look at every number of weights while they are loaded, as a share of the loading.

    OMP_NUM_THREADS=1 python benchmarks/weight_checks.py

For the embedded model, and for a CLIP vision tower of ViT-L's size with random weights in a temporary folder. All parts
are timed inside whole loadings; the files are in the disk's cache after the first one, which isn't counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

SPENT: dict[str, float] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose seconds are added up under this name."""

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            SPENT[name] = SPENT.get(name, 0.0) + time.perf_counter() - start

    return call


def counted_anew(function: Callable[..., Any], known: dict[Any, int]) -> Callable[..., Any]:
    """The function, without what it knows from an earlier loading; of a UNet it is known, as its skeleton is built."""

    def call(kind: type, *arguments: Any) -> None:
        for key in [key for key in known if key[0] is kind and kind.__name__ != "UNet2DConditionModel"]:
            del known[key]
        function(kind, *arguments)

    return call


def measure(what: str, load: Callable[[], Any], runs: int) -> None:
    """Print a row: seconds of loading, and the shares of the checks in it."""
    load()
    totals: list[float] = []
    shares: dict[str, list[float]] = {}
    for _ in range(runs):
        SPENT.clear()
        start = time.perf_counter()
        load()
        totals.append(time.perf_counter() - start)
        for name in ("claims", "headings", "sizes", "finite"):
            shares.setdefault(name, []).append(SPENT.get(name, 0.0) / totals[-1])
    cells = " | ".join(f"{statistics.median(values):.3f}" for values in shares.values())
    print(f"| {what} | {statistics.median(totals):.2f} | {cells} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="what the checks of weights cost")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24, help="of the CLIP; ViT-L has 24")
    options = parser.parse_args()

    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from data_pipeline.models import weights
    from msdiffusion import MSDiffusion
    from msdiffusion.backbone import configs, pretrained
    from msdiffusion.backbone.backbone import quiet_loading
    from msdiffusion.own_memory import give_own_memory
    from msdiffusion.places import DEFAULT_MODEL

    quiet_loading()
    weights.check_network = configs.check_network = timed("claims", weights.check_network)
    weights.read_headings = timed("headings", weights.read_headings)
    weights._check_size = timed("sizes", counted_anew(weights._check_size, weights._numbers))
    weights.check_finite = pretrained.check_finite = timed("finite", weights.check_finite)
    print("| loading | seconds, median | share of claims | of headers | of sizes | of finite numbers |")
    print("|---|---|---|---|---|---|")
    measure("embedded model", lambda: MSDiffusion.from_pretrained(DEFAULT_MODEL, device="cpu"), options.runs)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "patch_size": 14}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=options.layers, projection_dim=768)
    with tempfile.TemporaryDirectory() as folder:
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
        for dtype in (torch.float32, torch.float16):
            name = f"ViT-L ({options.layers} layers) as {str(dtype).removeprefix('torch.')}"

            def load(dtype: torch.dtype = dtype) -> None:
                give_own_memory(pretrained.load_image_encoder(folder, dtype)[0])  # as every backbone does

            measure(name, load, options.runs)
    print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
