"""Between picking frames and naming entities: a caption for every clip that came without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.errors import SettingsError
from data_pipeline.records import FramePair, Rejected
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.hub import HubModel

CAPTIONERS = ("files", "blip")


@dataclass(kw_only=True)
class WriteCaptions(Step[FramePair, FramePair]):
    """Captions the target frame of a clip whose caption is blank; the others keep theirs.

    captioner: "files" (captions come with the videos; without one a clip is rejected) or "blip". model: BLIP's
    directory or hub id, the released one if empty. max_tokens: length of a caption at most. device: "cpu", "cuda",
    "cuda:1". frames_per_batch: pictures in one pass; more are quicker on a GPU and may change a word where two are
    equally likely.
    """

    path_settings: ClassVar[tuple[str, ...]] = ("model",)

    captioner: str = "files"
    model: str = ""
    max_tokens: int = 40
    device: str = "cpu"
    frames_per_batch: int = 1

    def __post_init__(self) -> None:
        if self.captioner not in CAPTIONERS:
            raise SettingsError(f"captioner must be one of {', '.join(CAPTIONERS)}, got {self.captioner!r}")
        if self.max_tokens < 1 or self.frames_per_batch < 1:
            raise SettingsError(
                f"max_tokens and frames_per_batch must be at least 1, got {self.max_tokens} and {self.frames_per_batch}"
            )
        if self.captioner == "files":
            if self.model:
                raise SettingsError("--caption-model is for --caption blip; captions are read from files")
            return
        from data_pipeline.models.hub import BLIP
        from data_pipeline.models.model_files import TEXT_AND_IMAGE_MODEL, check_model_directory

        # Set here, so that it is recorded with the settings.
        self.model = self.model or BLIP.hub_id
        check_model_directory(self.model, "--caption-model", TEXT_AND_IMAGE_MODEL)

    @property
    def model_device(self) -> str:
        """See Step."""
        return "" if self.captioner == "files" else self.device

    def downloads(self) -> dict[str, HubModel]:
        """See Step."""
        from data_pipeline.models.hub import transformers_model
        from data_pipeline.models.model_files import is_hub_id

        return {"model": transformers_model(self.model)} if self.captioner == "blip" and is_hub_id(self.model) else {}

    def setup(self) -> None:
        """Loads the captioner, if there is one."""
        self._captioner = None
        if self.captioner == "blip":
            from data_pipeline.models.captioner import load_captioner

            self._captioner = load_captioner(
                self.place_of("model"), self.device, max_tokens=self.max_tokens, batch_size=self.frames_per_batch
            )

    def process_many(self, records: Sequence[FramePair]) -> list[FramePair | Rejected]:
        """The pairs with captions, rejected if none is to be had; all frames that need one in one call."""
        blank = [number for number, record in enumerate(records) if not record.video.caption.strip()]
        results: list[FramePair | Rejected] = list(records)
        if self._captioner is None:
            for number in blank:
                results[number] = Rejected("no caption", {"captioner": self.captioner})
            return results
        captions = self._captioner.caption([records[number].target.image for number in blank])
        for number, caption in zip(blank, captions, strict=True):
            record = records[number]
            if caption:
                results[number] = replace(record, video=replace(record.video, caption=caption))
            else:
                results[number] = Rejected("the captioner wrote nothing", {"frame": record.target.index})
        return results
