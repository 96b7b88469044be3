"""A model written into a folder or a hub repository, with a card; ``MSDiffusion`` documents it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.card import CARD_NAME, is_generated, write_card
from msdiffusion.adapter.loading import Sources
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.errors import RequestError, WeightsError, reason
from msdiffusion.files import check_folder, share
from msdiffusion.request.subjects import true_or_false

BASE_FOLDER, ENCODER_FOLDER = "base", "image_encoder"


def save(
    backbone: Backbone, adapter: MSAdapter, sources: Sources | None, directory: str | Path, include_backbone: bool
) -> None:
    """See ``MSDiffusion.save_pretrained``."""
    directory = check_folder(directory, "directory")
    if true_or_false(include_backbone, "include_backbone"):
        _check_savable(backbone.pipeline)
        new = [directory / name for name in (BASE_FOLDER, ENCODER_FOLDER) if not (directory / name).exists()]
        try:
            backbone.pipeline.save_pretrained(directory / BASE_FOLDER)
            backbone.image_encoder.save_pretrained(directory / ENCODER_FOLDER)
            backbone.image_processor.save_pretrained(directory / ENCODER_FOLDER)
        except (OSError, SafetensorError) as error:  # of a full disk
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
            raise RequestError(f"{directory} cannot be written: {reason(error)}") from error
        for folder in (BASE_FOLDER, ENCODER_FOLDER):
            share(directory / folder)
        sources = Sources(BASE_FOLDER, ENCODER_FOLDER)
    elif sources is None:
        raise WeightsError("this model's backbone was built in memory: save it with include_backbone=True")
    adapter.save_pretrained(directory, **vars(sources))
    write_card(directory, adapter)


def push(
    backbone: Backbone,
    adapter: MSAdapter,
    sources: Sources | None,
    repo_id: str,
    include_backbone: bool,
    private: bool,
    token: str | None,
) -> str:
    """See ``MSDiffusion.push_to_hub``."""
    if not include_backbone and (sources is None or sources.local):
        raise WeightsError("the backbone lies on this machine only: push with include_backbone=True")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(backbone, adapter, sources, folder, include_backbone)
        write_card(folder, adapter, repo_id)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if api.file_exists(repo_id, CARD_NAME):
            present = Path(api.hf_hub_download(repo_id, CARD_NAME)).read_text(encoding="utf-8")
            if not is_generated(present):
                (Path(folder) / CARD_NAME).unlink()
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(url)


def _check_savable(pipeline: Any) -> None:
    """Raise WeightsError where the files of a base would not give these networks again."""
    for name in ("unet", "text_encoder", "text_encoder_2"):
        weights = {} if getattr(pipeline, name, None) is None else getattr(pipeline, name).state_dict()
        if any(".base_layer." in key for key in weights):
            raise WeightsError(
                f"a LoRA is in the {name}, which the files of a base have no place for: take it out with "
                "model.pipeline.unload_lora_weights(), after model.pipeline.fuse_lora() where it shall be kept"
            )
        if any(weight.device.type == "meta" for weight in weights.values()):
            raise WeightsError(f"offloading keeps weights of the {name} elsewhere: save a model without it")
    if getattr(pipeline.unet, "encoder_hid_proj", None) is not None:
        raise WeightsError(
            "an IP-Adapter is in the UNet, which the files of a base have no place for: take it out with "
            "model.pipeline.unload_ip_adapter()"
        )
