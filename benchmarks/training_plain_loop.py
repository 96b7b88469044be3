"""The plain loop that training is compared with: everything is encoded at every step, as the official script does.

Written from the description of the official training script, with the real networks and the real pairs and none of
this project's training code: the loader runs in the main process and opens every picture anew; every sample is padded
to ``slots`` subjects, and the image encoder, the phrase encoder, the resampler and the attention see the padding too;
prompts, phrases, references and targets are encoded at every step; keys, values and masks of the subjects are made in
every layer, with the softmax of the subjects written out; text and self-attention are torch's fused ones. AdamW,
gradients clipped at 1, drops as in the paper.

Shape letters: B batch, S slots for subjects, T tokens per subject, Q patches, H heads, C layer width, N = S * T.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from msdiffusion.adapter.resampler import GroundingResampler, ResamplerParams
from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder  # noqa: F401  (diffusers finds it by its name)

TEXT, BOXES = "text_tokens", "boxes"


class SubjectsAfterText:
    """Cross-attention to [text; subjects]: one fused attention to the text, a written-out one to the subjects."""

    def __init__(self, to_k: nn.Linear, to_v: nn.Linear, tokens: int) -> None:
        self.to_k, self.to_v, self.tokens = to_k, to_v, tokens

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        plain: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attend from (B, Q, C) to text and subjects (B, L + N, width)."""
        assert plain is not None
        text, subjects = encoder_hidden_states.split([plain[TEXT], encoder_hidden_states.shape[1] - plain[TEXT]], dim=1)

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        hidden = functional.scaled_dot_product_attention(query, split(attn.to_k(text)), split(attn.to_v(text)))
        bias, inside = region_masks(plain[BOXES], math.isqrt(query.shape[2]), self.tokens)
        scores = query @ split(self.to_k(subjects)).transpose(-1, -2) * query.shape[-1] ** -0.5
        probabilities = (scores + bias.unsqueeze(1)).softmax(dim=-1)
        probabilities = torch.where(inside.unsqueeze(1), probabilities, 0.0)
        hidden = hidden + probabilities @ split(self.to_v(subjects))
        return attn.to_out[1](attn.to_out[0](hidden.transpose(1, 2).flatten(2)))


class OwnAttention(AttnProcessor2_0):
    """diffusers' own self-attention, which takes the other layers' keyword so that nobody warns of it."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        plain: dict[str, Any] | None = None,
    ) -> Tensor:
        """As the parent."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def region_masks(boxes: Tensor, side: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Additive mask (B, Q, N) of boxes (B, S, 4) on a square grid, and patches inside any box (B, Q, 1)."""
    ticks = torch.arange(side, device=boxes.device)
    x1, y1, x2, y2 = (boxes * side).unsqueeze(-2).unbind(-1)
    columns = (ticks >= x1.floor()) & (ticks < x2.ceil())
    rows = (ticks >= y1.floor()) & (ticks < y2.ceil())
    allowed = (rows[..., :, None] & columns[..., None, :]).flatten(2).transpose(1, 2)  # (B, Q, S)
    bias = torch.where(allowed, 0.0, -10000.0).repeat_interleave(tokens, dim=-1)
    return bias, allowed.any(dim=-1, keepdim=True)


class PlainPairs(Dataset[dict[str, Any]]):
    """Pairs of one dataset, decoded and prepared when they are asked for.

    Args:
        directory: of the shards.
        resolution: side of the training picture in pixels.
        slots: S; subjects beyond them are left out.
        processor: of the image encoder.
        background: RGB behind the cut-outs.
    """

    def __init__(
        self,
        directory: Path,
        resolution: int,
        slots: int,
        processor: CLIPImageProcessor,
        background: tuple[int, int, int] = (255, 255, 255),
    ) -> None:
        self.resolution, self.slots, self.processor, self.background = resolution, slots, processor, background
        self.pairs: list[tuple[Path, dict[str, tuple[int, int]]]] = []
        for shard in sorted(directory.glob("*.tar")):
            members: dict[str, dict[str, tuple[int, int]]] = {}
            with tarfile.open(shard) as archive:
                for member in archive:
                    key, _, suffix = member.name.partition(".")
                    members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            self.pairs += [(shard, found) for found in members.values()]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors of one pair, padded to S subjects."""
        shard, members = self.pairs[index]

        def read(suffix: str) -> bytes:
            offset, size = members[suffix]
            with shard.open("rb") as file:
                file.seek(offset)
                return file.read(size)

        record = json.loads(read("json"))
        subjects = record["subjects"][: self.slots]
        picture = Image.open(io.BytesIO(read("target.jpg"))).convert("RGB")
        scale = self.resolution / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        left, top = (picture.width - self.resolution) // 2, (picture.height - self.resolution) // 2
        target = picture.crop((left, top, left + self.resolution, top + self.resolution))
        boxes = np.zeros((self.slots, 4), dtype=np.float32)
        pixels = torch.zeros(self.slots, 3, self.processor.crop_size["height"], self.processor.crop_size["width"])
        for slot, subject in enumerate(subjects):
            corners = np.array(subject["target_box"]) * [*picture.size, *picture.size] - [left, top, left, top]
            boxes[slot] = np.clip(corners / self.resolution, 0, 1)
            cut_out = Image.open(io.BytesIO(read(f"reference_{slot}.png"))).convert("RGBA")
            canvas = Image.new("RGBA", (max(cut_out.size),) * 2, (*self.background, 255))
            place = ((canvas.width - cut_out.width) // 2, (canvas.height - cut_out.height) // 2)
            canvas.alpha_composite(cut_out, place)
            pixels[slot] = self.processor(canvas.convert("RGB"), return_tensors="pt").pixel_values[0]
        return {
            "caption": record["caption"],
            "phrases": [subject["phrase"] for subject in subjects] + [""] * (self.slots - len(subjects)),
            "target": torch.from_numpy(np.array(target)).permute(2, 0, 1).float() / 127.5 - 1,
            "boxes": torch.from_numpy(boxes),
            "references": pixels,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, texts as lists."""
    return {
        name: torch.stack([sample[name] for sample in samples])
        if isinstance(samples[0][name], Tensor)
        else [sample[name] for sample in samples]
        for name in samples[0]
    }


class PlainTraining:
    """Networks, optimizer and one step of the plain loop.

    Args:
        base_model: folder of an SDXL pipeline.
        image_encoder: folder of a CLIPVisionModelWithProjection.
        resampler: sizes of the resampler.
        device: where to compute.
        learning_rate: of AdamW.
    """

    def __init__(
        self,
        base_model: str,
        image_encoder: str,
        resampler: dict[str, int],
        device: str = "cpu",
        learning_rate: float = 1e-3,
    ) -> None:
        pipeline = DiffusionPipeline.from_pretrained(base_model)
        encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder)
        self.setup(pipeline, encoder, resampler, device, learning_rate)
        self.processor = CLIPImageProcessor.from_pretrained(image_encoder)

    def setup(self, pipeline: Any, encoder: Any, resampler: dict[str, int], device: str, learning_rate: float) -> None:
        """Freeze the networks and put the trained layers beside them."""
        self.pipeline, self.image_encoder, self.device = pipeline, encoder.to(device), device
        pipeline.to(device)
        self.unet = pipeline.unet
        for network in (self.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, encoder):
            network.eval().requires_grad_(False)
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        params = ResamplerParams(
            image_width=encoder.config.hidden_size,
            phrase_width=pipeline.text_encoder.config.hidden_size,
            output_width=self.unet.config.cross_attention_dim,
            **resampler,
        )
        self.trained = nn.ModuleDict({"resampler": GroundingResampler(params)})
        processors = {}
        for name in self.unet.attn_processors:
            if name.endswith("attn2.processor"):
                attn = self.unet.get_submodule(name.removesuffix(".processor"))
                layer = nn.ModuleDict()
                for part in ("to_k", "to_v"):
                    own = getattr(attn, part)
                    layer[part] = nn.Linear(own.in_features, own.out_features, bias=False)
                    layer[part].load_state_dict({"weight": own.weight})
                self.trained[name.replace(".", "/")] = layer
                processors[name] = SubjectsAfterText(layer["to_k"], layer["to_v"], params.tokens)
            else:
                processors[name] = OwnAttention()
        self.trained.to(device)
        self.unet.set_attn_processor(processors)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=learning_rate, weight_decay=0.01)

    def batches(self, pairs: PlainPairs, batch_size: int) -> Iterator[dict[str, Any]]:
        """Shuffled batches without end, loaded in this process."""
        while True:
            yield from DataLoader(pairs, batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def step(self, batch: dict[str, Any]) -> float:
        """Encode, predict, learn; returns the loss."""
        B, S = batch["boxes"].shape[:2]
        boxes = batch["boxes"].to(self.device)
        draw = torch.rand(B)
        no_image, no_text = (draw < 0.05) | (draw >= 0.95), ((draw >= 0.05) & (draw < 0.1)) | (draw >= 0.95)
        no_grounding = (torch.rand(B) < 0.1).to(self.device)
        with torch.no_grad():
            latents = self.pipeline.vae.encode(batch["target"].to(self.device)).latent_dist.sample()
            latents = latents * self.pipeline.vae.config.scaling_factor
            captions = ["" if drop else caption for drop, caption in zip(no_text, batch["caption"], strict=True)]
            text, _, pooled, _ = self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
            phrases = [phrase for row in batch["phrases"] for phrase in row]
            tokens = self.pipeline.tokenizer(
                phrases,
                padding="max_length",
                max_length=self.pipeline.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            phrases = self.pipeline.text_encoder(tokens.input_ids.to(self.device)).pooler_output
            references = torch.where(no_image.view(B, 1, 1, 1, 1), 0.0, batch["references"]).flatten(0, 1)
            seen = self.image_encoder(references.to(self.device), output_hidden_states=True).hidden_states[-2]
        subjects = self.trained["resampler"](
            seen.unflatten(0, (B, S)), phrases.unflatten(0, (B, S)), boxes, drop_grounding=no_grounding
        )
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (B,), device=self.device)
        side = batch["target"].shape[-1]
        sizes = torch.tensor([side, side, 0, 0, side, side], device=self.device, dtype=torch.float32).expand(B, 6)
        prediction = self.unet(
            self.schedule.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=torch.cat([text, subjects.flatten(1, 2)], dim=1),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            cross_attention_kwargs={"plain": {TEXT: text.shape[1], BOXES: boxes}},
            return_dict=False,
        )[0]
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = functional.mse_loss(prediction.float(), target.float())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())
