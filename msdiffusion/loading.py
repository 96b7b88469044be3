"""Finding and loading: an adapter with the places of its frozen models, checked against their configs.

Nothing large is read before the parts are known to fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from msdiffusion.adapter import AdapterConfig, MSAdapter
from msdiffusion.backbone import encoder_widths, skeleton_unet
from msdiffusion.errors import WeightsError


def load_adapter(
    model: str | Path, base_model: str | Path | None = None, image_encoder: str | Path | None = None, **config: Any
) -> tuple[MSAdapter, str, str]:
    """An adapter on the CPU, checked against the configs of its backbone, with the places of the two frozen models.

    Args:
        model: an adapter's folder, a hub repository, or the official ``ms_adapter.bin``.
        base_model: in place of the one that the adapter names.
        image_encoder: in place of the one that the adapter names.
        config: for the official file: ``head_width`` and fields of AdapterConfig.

    Raises:
        WeightsError: something is missing, or the parts do not fit; the message names both shapes.
    """
    if Path(model).is_file() or Path(model).suffix == ".bin":
        if not Path(model).is_file():  # told before the base model is looked for, which may be a download
            raise WeightsError(f"no such file: {model}")
        names = {"base_model": base_model, "image_encoder": image_encoder}
        config |= {name: str(value) for name, value in names.items() if value is not None}
        unet = skeleton_unet(config.get("base_model", AdapterConfig.base_model))
        adapter = MSAdapter.from_official(model, unet, **config)
        base, encoder = adapter.config.base_model, adapter.config.image_encoder
    else:
        directory = find_directory(model)
        adapter = MSAdapter.from_pretrained(directory)
        base, encoder = (
            _place(directory, named) if given is None else str(given)
            for given, named in ((base_model, adapter.config.base_model), (image_encoder, adapter.config.image_encoder))
        )
        adapter.check_unet(skeleton_unet(base))
    check_encoders(adapter.config, *encoder_widths(base, encoder, adapter.config.reference_features))
    return adapter, base, encoder


def check_encoders(config: AdapterConfig, phrase_width: int, image_width: int) -> None:
    """Raise WeightsError unless the text and image encoders are as wide as the adapter expects."""
    for what, ours, theirs in (
        ("phrase embeddings", config.resampler.phrase_width, phrase_width),
        ("image tokens", config.resampler.image_width, image_width),
    ):
        if ours != theirs:
            encoder = "text encoder" if what == "phrase embeddings" else "image encoder"
            raise WeightsError(
                f"the adapter takes {what} {ours} wide, but this {encoder} gives {theirs}: use the {encoder} that the "
                "adapter was trained on"
            )


def find_directory(model: str | Path) -> Path:
    """A local folder as it is; the name of a hub repository after downloading it.

    Raises:
        WeightsError: neither.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"no such folder: {model}; as a hub repository it cannot be had either: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _place(directory: Path, name: str) -> str:
    """A model named in a config: relative to the adapter's folder where that exists, else as it is."""
    inside = directory / name
    return str(inside) if inside.exists() else name
