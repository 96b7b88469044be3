"""The command as a user runs it, and what training does with what it wrote."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import load

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training import precompute
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.encodings import precomputation
from msdiffusion.training.encodings.keys import changing, part_keys
from msdiffusion.training.encodings.store import open_store
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.samples.encoded import PARTS

pytestmark = pytest.mark.usefixtures("loaded_once")

RESAMPLER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}
MODULE, DATA = "msdiffusion.training.module.MSDiffusionModule", "msdiffusion.training.datamodule.PairsDataModule"


def write_config(path, models, pairs, model=None, data=None):
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {"devices": 4, "strategy": "ddp", "max_steps": 5},
                "model": {
                    "class_path": MODULE,
                    "init_args": {
                        "base_model": str(models / "base"),
                        "image_encoder": str(models / "image_encoder"),
                        "resampler": RESAMPLER,
                        **(model or {}),
                    },
                },
                "data": {
                    "class_path": DATA,
                    "init_args": {
                        "pairs": str(pairs),
                        "resolution": 32,
                        "batch_size": 4,
                        "max_subjects": 2,
                        "validation_fraction": 0.2,
                        **(data or {}),
                    },
                },
            }
        )
    )
    return path


@pytest.fixture
def pairs(pairs_dir, tmp_path) -> Path:
    """A copy of 24 pairs in three shards, to write beside."""
    return Path(shutil.copytree(pairs_dir, tmp_path / "pairs"))


@pytest.fixture(scope="session")
def encoded_pairs(pairs_dir, tiny_model_dir, tmp_path_factory) -> Path:
    """24 pairs with all their encodings beside them. Read it, don't write to it."""
    directory = tmp_path_factory.mktemp("encoded")
    pairs = Path(shutil.copytree(pairs_dir, directory / "pairs"))
    config = write_config(directory / "config.yaml", tiny_model_dir, pairs)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--batch-size", "5"]) == 0
    return pairs


@pytest.fixture
def own_encoded_pairs(encoded_pairs, tmp_path) -> Path:
    """A copy of them, to break."""
    return Path(shutil.copytree(encoded_pairs, tmp_path / "own"))


@pytest.fixture
def make_run(tiny_model_dir):
    """Function: settings -> (data module, model) after setup, no trainer running."""

    def make(pairs, model=None, **data):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        folders = {"base_model": str(tiny_model_dir / "base"), "image_encoder": str(tiny_model_dir / "image_encoder")}
        torch.manual_seed(0)
        module = MSDiffusionModule(**folders | {"resampler": RESAMPLER} | (model or {}))
        settings = {"resolution": 32, "batch_size": 4, "max_subjects": 2, "validation_fraction": 0.2}
        datamodule = PairsDataModule(str(pairs), **settings | data)
        datamodule.trainer = module.trainer = trainer
        trainer.strategy.connect(module)
        datamodule.setup("fit")
        module.configure_model()
        return datamodule, module

    return make


def open_first(run, **settings):
    datamodule, module = run
    keys = partial(part_keys, datamodule.samples, module.backbone, module.adapter.config)
    never = changing(datamodule.samples.augmentation)
    source = datamodule.source
    return open_store(datamodule.catalogues()[0], never, keys, source.encodings_folder, source.encodings == "require")


def files_of(pairs, part="*"):
    return sorted(pairs.glob(f"encodings/{part}-*/*.safetensors"))


def test_every_pair_and_part_is_encoded(encoded_pairs, make_run):
    store = open_first(make_run(encoded_pairs))
    assert store.parts == frozenset(PARTS)
    assert len(files_of(encoded_pairs)) == 9
    sample = store.read(23)
    assert sample.latent_mean.shape == sample.latent_deviation.shape == (4, 16, 16)
    assert sample.phrase_embeddings.shape == (2, 16)
    assert sample.image_tokens.shape == (2, 65, 24)
    assert all(not path.name.endswith(".tmp") for path in encoded_pairs.rglob("*"))


def test_the_loss_is_the_same_with_and_without(encoded_pairs, make_run):
    """Drops included: every sample of these batches loses something, or nothing."""
    drops = {"drop_image": 0.25, "drop_text": 0.25, "drop_both": 0.25, "drop_grounding": 0.5}
    losses = {}
    for encodings in ("off", "require"):
        datamodule, module = make_run(encoded_pairs, drops, encodings=encodings)
        module.log = lambda *_, **__: None
        for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
            for batch in loader:
                assert (batch.encoded is None) == (batch.targets is not None) == (encodings == "off")
                torch.manual_seed(0)
                losses.setdefault(encodings, []).append(float(module.training_step(batch, 0)))
    assert len(losses["off"]) >= 4
    assert losses["require"] == pytest.approx(losses["off"], rel=1e-5, abs=1e-6)


def fitted(pairs, models, **data):
    pl.seed_everything(0)
    module = MSDiffusionModule(
        str(models / "base"), str(models / "image_encoder"), resampler=RESAMPLER, learning_rate=1e-3, ema_decay=0.9
    )
    settings = {"resolution": 32, "batch_size": 4, "max_subjects": 2, "validation_fraction": 0.2}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, PairsDataModule(str(pairs), **settings | data))
    return module.trained_adapter.state_dict(), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_gives_the_same_weights_with_and_without(encoded_pairs, tiny_model_dir, workers):
    plain, plain_metrics = fitted(encoded_pairs, tiny_model_dir, encodings="off")
    ahead, ahead_metrics = fitted(encoded_pairs, tiny_model_dir, encodings="require", num_workers=workers)
    # Other batches of the encoders, so other last bits; where a gradient is next to nothing Adam makes a step of up to
    # the learning rate of them, here 1e-3.
    for name, tensor in plain.items():
        torch.testing.assert_close(ahead[name], tensor, rtol=0, atol=1e-4)
        assert (ahead[name] - tensor).abs().mean() < 1e-6
    assert ahead_metrics == pytest.approx(plain_metrics, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_a_precision_is_kept_in_half_the_room(pairs, tiny_model_dir, tmp_path, make_run, dtype):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--dtype", dtype]) == 0
    store = open_first(make_run(pairs))
    assert store.read(0).image_tokens.dtype == getattr(torch, dtype)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--parts", "references"]) == 0
    exact = open_first(make_run(pairs)).read(0).image_tokens  # the most exact one of several is taken
    assert exact.dtype == torch.float32
    torch.testing.assert_close(store.read(0).image_tokens.float(), exact, rtol=1e-2, atol=1e-2)


def test_parts_may_be_encoded_alone_and_training_does_the_rest(pairs, tiny_model_dir, tmp_path, make_run):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs, data={"crop": "random"})
    assert precompute.main(["-c", str(config), "--device", "cpu", "--parts", "text,references"]) == 0
    for crop in ("random", "center"):
        datamodule, module = make_run(pairs, crop=crop)
        module.log = lambda *_, **__: None
        batch = next(iter(datamodule.train_dataloader()))
        assert batch.encoded.has_text and batch.encoded.has_references and not batch.encoded.has_latents
        assert batch.references is None and batch.targets is not None
        assert torch.isfinite(module.training_step(batch, 0))


def test_pictures_of_several_sizes(pairs, tiny_model_dir, tmp_path, make_run):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs, data={"bucket_step": 8})
    assert precompute.main(["-c", str(config), "--device", "cpu"]) == 0
    datamodule, module = make_run(pairs, bucket_step=8)
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.size[0] != batch.size[1]
    assert batch.encoded.latent_mean.shape[-2:] == (batch.size[0] // 2, batch.size[1] // 2)
    datamodule, _ = make_run(pairs, bucket_step=8, encodings="off")
    plain = next(iter(datamodule.train_dataloader()))
    mean, _ = module.backbone.latent_posterior(plain.targets)
    torch.testing.assert_close(batch.encoded.latent_mean, mean, rtol=0, atol=1e-5)


def test_stable_diffusion_1x_has_no_pooled_prompt(pairs, tiny_sd1_model_dir, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny_sd1_model_dir, pairs)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--parts", "text"]) == 0
    datamodule, module = precompute.load_run(str(config), [], "cpu")
    sample = open_first((datamodule, module)).read(3)
    assert sample.pooled is None and sample.prompt_states is not None


def test_it_goes_on_where_it_was(own_encoded_pairs, tiny_model_dir, tmp_path, make_run, capsys):
    """Files that are whole and fit are kept; a missing and a broken one are written."""
    missing, broken, *kept = files_of(own_encoded_pairs)
    content = {path: load(path.read_bytes()) for path in (missing, broken, *kept)}
    changed = {path: path.stat().st_mtime_ns for path in kept}
    missing.unlink()
    broken.write_bytes(b"half a file")
    left = missing.with_name(f"{missing.name}.0of1.tmp")
    left.write_bytes(b"left by a process that was killed")
    with pytest.raises(DataError, match=r"do not fit its pairs: in .*latents.*pairs-000000.tar was not encoded \(2 of"):
        open_first(make_run(own_encoded_pairs))
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, own_encoded_pairs)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--batch-size", "5"]) == 0
    assert "20 pairs are to be encoded here" in capsys.readouterr().out
    assert not left.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == changed
    for path, tensors in content.items():
        torch.testing.assert_close(load(path.read_bytes()), tensors, rtol=0, atol=0)
    assert open_first(make_run(own_encoded_pairs)) is not None


def test_processes_may_share_the_work(pairs, tiny_model_dir, tmp_path, make_run):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    arguments = ["-c", str(config), "--device", "cpu", "--parts", "text"]
    assert precompute.main([*arguments, "--share", "1/2"]) == 0
    assert [path.name for path in files_of(pairs)] == ["pairs-000001.safetensors"]
    with pytest.raises(DataError, match="was not encoded"):
        open_first(make_run(pairs))
    assert precompute.main([*arguments, "--share", "0/2"]) == 0
    assert open_first(make_run(pairs)).parts == {"text"}


def test_a_failure_leaves_no_half_file(pairs, tiny_model_dir, tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    shard = pairs / "pairs-000001.tar"
    content = bytearray(shard.read_bytes())
    second = content.index(b"\xff\xd8\xff", content.index(b"\xff\xd8\xff") + 3)  # not among those that are tried first
    content[second : second + 2] = b"\0\0"
    shard.write_bytes(content)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--workers", "1"]) == 2
    assert "pairs-000001.tar" in capsys.readouterr().err
    assert {path.name for path in files_of(pairs)} == {"pairs-000000.safetensors"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"resolution": 64}, r"the latents of .* are stale: in .*latents-.*resolution was 32, now 64.*--parts latents"),
        ({"minimum_visible": 0.5}, "minimum_visible was 0.25, now 0.5"),
        ({"bucket_step": 8}, "bucket_step was 0, now 8"),
        ({"model": {"reference_fit": "pad"}}, "reference_fit was squash, now pad"),
        ({"model": {"reference_background": [1, 2, 3]}}, r"reference_background was \[0, 0, 0\], now \[1, 2, 3\]"),
        (
            {"model": {"base_dtype": "bfloat16"}},  # of all networks but the autoencoder
            "it was made with another image encoder, or the same in another precision",
        ),
    ],
)
def test_stale_encodings_are_refused(encoded_pairs, make_run, settings, told):
    with pytest.raises(DataError, match=told) as caught:
        open_first(make_run(encoded_pairs, **settings))
    assert "python -m msdiffusion.training.precompute -c CONFIG" in str(caught.value)
    assert "encodings off" in str(caught.value)


@pytest.mark.parametrize("network", ["autoencoder", "text encoder", "second text encoder", "image encoder"])
def test_encodings_of_other_networks_are_refused(encoded_pairs, make_run, network):
    datamodule, module = make_run(encoded_pairs)
    parts = {
        "autoencoder": module.backbone.vae,
        "text encoder": module.backbone.pipeline.text_encoder,
        "second text encoder": module.backbone.pipeline.text_encoder_2,
        "image encoder": module.backbone.image_encoder,
    }
    with torch.no_grad():
        next(iter(parts[network].parameters())).view(-1)[0] += 1e-3
    with pytest.raises(DataError, match=f"it was made with another {network}"):
        open_first((datamodule, module))


def test_another_tokenizer_is_noticed_and_its_last_call_is_not(encoded_pairs, make_run):
    datamodule, module = make_run(encoded_pairs)
    module.backbone.tokenizer(["a dog", "a"], padding=True, truncation=True, max_length=4)
    assert open_first((datamodule, module)) is not None
    module.backbone.pipeline.tokenizer_2.model_max_length = 20
    with pytest.raises(DataError, match="it was made with another second tokenizer"):
        open_first((datamodule, module))


def test_another_preprocessing_is_noticed(encoded_pairs, make_run):
    datamodule, module = make_run(encoded_pairs)
    module.backbone.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(DataError, match="another preprocessing of the image encoder"):
        open_first((datamodule, module))


def test_a_shard_that_was_changed_is_noticed(own_encoded_pairs, make_run, shard_writer):
    write_shard, make_record = shard_writer
    os.utime(own_encoded_pairs / "pairs-000001.tar")  # touched, not changed
    assert open_first(make_run(own_encoded_pairs)) is not None
    shard = own_encoded_pairs / "pairs-000002.tar"
    keys = [f"clip_{i:06d}" for i in range(20, 24)]
    write_shard(shard, [(key, make_record(key, [(0.2, 0.2, 0.7, 0.8)], (96, 64))) for key in keys], seed=9)
    with pytest.raises(DataError, match=r"pairs-000002.tar was changed since \(|pairs-000002.tar was changed since\."):
        open_first(make_run(own_encoded_pairs))


def test_a_dataset_that_grew_is_noticed(own_encoded_pairs, make_run, shard_writer):
    write_shard, make_record = shard_writer
    entries = [("new", make_record("new", [(0.2, 0.2, 0.7, 0.8)], (96, 64)))]
    write_shard(own_encoded_pairs / "pairs-000003.tar", entries)
    with pytest.raises(DataError, match=r"pairs-000003.tar was not encoded.*--parts latents --dtype float32"):
        open_first(make_run(own_encoded_pairs))


def test_a_manifest_of_another_format_or_none_is_refused(own_encoded_pairs, make_run):
    manifest = next(own_encoded_pairs.glob("encodings/text-*/manifest.json"))
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": "msdiffusion.encodings/0"}))
    with pytest.raises(DataError, match="its format is 'msdiffusion.encodings/0'"):
        open_first(make_run(own_encoded_pairs))
    manifest.write_text("{")
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        open_first(make_run(own_encoded_pairs))
    manifest.write_text("[]")
    with pytest.raises(DataError, match=r"is no manifest"):
        open_first(make_run(own_encoded_pairs))


def test_require_wants_something(pairs, encoded_pairs, make_run):
    assert open_first(make_run(pairs)) is None
    with pytest.raises(DataError, match=r"encodings: require, but none of .* can be used .*--parts latents,references"):
        open_first(make_run(pairs, encodings="require"))
    store = open_first(make_run(encoded_pairs, encodings="require", crop="random", reference_augmentation=0.1))
    assert store.parts == {"text"}


@pytest.mark.parametrize(
    ("settings", "parts", "told"),
    [
        ({"crop": "random"}, "latents,text", "crop is 'random', not 'center'.*--parts text encodes the rest ahead"),
        ({"flip_probability": 0.5}, "latents", "flip_probability is 0.5, not 0.*nothing is left"),
        ({"reference_augmentation": 0.2}, "references", "reference_augmentation is 0.2, not 0"),
        ({"reference_flip_probability": 0.2}, "references", "reference_flip_probability is 0.2, not 0"),
        ({}, "latent", "--parts must be some of latents, references, text"),
        ({}, ",", "--parts must be some of"),
    ],
)
def test_what_cannot_be_made_ahead_is_refused(pairs, tiny_model_dir, tmp_path, capsys, settings, parts, told):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs, data=settings)
    assert precompute.main(["-c", str(config), "--device", "cpu", "--parts", parts]) == 2
    with pytest.raises(RequestError, match=told):
        raise RequestError(capsys.readouterr().err)
    assert not (pairs / "encodings").exists()


def test_what_does_not_fit_on_the_disk_is_refused(pairs, tiny_model_dir, tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    monkeypatch.setattr(precomputation.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert precompute.main(["-c", str(config), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "do not fit on the disk" in error and "24 pairs" in error and "100 kB are free" in error
    assert not files_of(pairs)


def test_the_estimate_is_what_is_written(pairs, tiny_model_dir, tmp_path):
    """Every pair of this dataset has 1 or 2 subjects in turn, so eight of them tell the mean."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    datamodule, module = precompute.load_run(str(config), [], "cpu")
    work = precomputation.Precomputation(
        datamodule.fixed_dataset(datamodule.catalogues()[0]), module.backbone, module.adapter.config,
        module.prepare_references, parts=["latents", "references"], dtype="float16", out=None, workers=0, batch_size=8,
    )  # fmt: skip
    expected = work.bytes_per_pair()
    work.run(work.tasks(), progress=False)
    assert not work.tasks()
    for part, folder in work.folders.items():
        written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert written == pytest.approx(24 * expected[part], rel=0.35)
    assert expected["latents"] == 2 * 4 * 16 * 16 * 2


def test_the_encodings_may_lie_elsewhere(pairs, tiny_model_dir, tmp_path, make_run):
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, pairs)
    out = tmp_path / "elsewhere"
    arguments = ["-c", str(config), "--device", "cpu", "--parts", "text", "--out", str(out)]
    assert precompute.main([*arguments, "--pairs", str(pairs)]) == 0
    assert not (pairs / "encodings").exists()
    assert open_first(make_run(pairs)) is None
    assert open_first(make_run(pairs, encodings_folder=str(out))).parts == {"text"}


def test_another_kind_of_training_is_refused(tmp_path, capsys):
    assert precompute.main(["-c", "configs/embedded/text_to_image.yaml", "--device", "cpu"]) == 2
    assert "only what MSDiffusionModule learns from PairsDataModule" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--share", "2/2"], ["--share", "x"], ["--workers", "-1"], ["--batch-size", "0"]]
)
def test_wrong_options_are_told(arguments, capsys):
    with pytest.raises(SystemExit):
        precompute.main(["-c", "none.yaml", *arguments])
    assert "must be" in capsys.readouterr().err


def test_texts_are_encoded_once_and_the_oldest_forgotten():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return [(torch.full((2,), float(len(text))),) for text in texts]

    remembered = precomputation.Remembered(max_bytes=2 * 8)
    assert remembered.ask(["a", "bb", "a"], encode)["bb"][0].tolist() == [2, 2]
    remembered.ask(["a", "ccc"], encode)  # forgets "bb"
    remembered.ask(["a", "bb"], encode)
    assert asked == [["a", "bb"], ["ccc"], ["bb"]]
    assert len(remembered.ask(["a", "b", "c", "d"], encode)) == 4  # more at once than are kept
