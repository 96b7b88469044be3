import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training import datamodule as datamodule_file
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.processes import RANK, WORLD
from msdiffusion.training.samples.encoded import EncodedSample


def no_pixels(pictures):
    """Stands in for the image encoder's preprocessing."""
    return torch.zeros(len(pictures), 3, 2, 2)


def latent_shape(height, width):
    """As an autoencoder of factor 8."""
    return 4, height // 8, width // 8


def attached(pairs, resolution=64, *, world=(0, 1), hparams=None, stage="fit", accumulate=1, **settings):
    """A data module with what it needs of a trainer."""
    datamodule = PairsDataModule(str(pairs) if not isinstance(pairs, dict) else pairs, resolution, **settings)
    model = SimpleNamespace(prepare_references=no_pixels, latent_shape=latent_shape, hparams=hparams or {})
    datamodule.trainer = SimpleNamespace(
        lightning_module=model, global_rank=world[0], world_size=world[1], accumulate_grad_batches=accumulate
    )
    datamodule.setup(stage)
    return datamodule


def keys_of(loader):
    return [key for batch in loader for key in batch.keys]


def test_loaders_cover_the_dataset_once(pairs_dir):
    datamodule = attached(pairs_dir, batch_size=4, validation_fraction=0.2)
    training, validation = keys_of(datamodule.train_dataloader()), keys_of(datamodule.val_dataloader())
    assert len(set(training)) == len(training) == len(datamodule.training) // 4 * 4
    assert validation == [datamodule.validation.pairs.key(int(index)) for index in datamodule.validation.indices]
    assert len(validation) == len(datamodule.validation)
    assert not set(training) & set(validation)


def test_the_seed_decides_order_and_chance(pairs_dir):
    def seen(seed):
        loader = attached(pairs_dir, batch_size=4, seed=seed, box_jitter=0.1).train_dataloader()
        return [(tuple(batch.keys), batch.boxes.sum().item(), batch.draws.noise.sum().item()) for batch in loader]

    first, again, other = seen(0), seen(0), seen(1)
    assert first == again
    assert not set(first) & set(other)


def test_processes_share_the_batches(pairs_dir):
    whole = attached(pairs_dir, batch_size=8, validation_fraction=0).train_dataloader()
    parts = [
        attached(pairs_dir, batch_size=4, validation_fraction=0, world=(rank, 2)).train_dataloader()
        for rank in range(2)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch.keys) == sorted(first.keys + second.keys)
        assert batch.numbers[0::2].tolist() == first.numbers.tolist()
        torch.testing.assert_close(batch.draws.noise[1::2], second.draws.noise, rtol=0, atol=0)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_are_the_larger_batch_also_at_the_end_of_an_epoch(pairs_dir, batch_size, accumulate):
    """An epoch of 20 pairs: two steps of 8. What was left used to make a step, divided as if it were whole."""
    whole = attached(pairs_dir, batch_size=8, validation_fraction=0.2)
    parts = attached(pairs_dir, batch_size=batch_size, accumulate=accumulate, validation_fraction=0.2)
    assert len(whole.training) % 8
    loaders = [datamodule.train_dataloader() for datamodule in (whole, parts)]
    assert len(loaders[1]) == accumulate * len(loaders[0])
    for _ in range(2):  # epochs
        pieces = iter(loaders[1])
        for batch in loaders[0]:
            same = [next(pieces) for _ in range(accumulate)]
            assert batch.keys == [key for piece in same for key in piece.keys]
            assert torch.equal(batch.draws.noise, torch.cat([piece.draws.noise for piece in same]))
        for loader in loaders:
            loader.sampler.place.begin_epoch()


def test_pairs_that_make_no_whole_step_are_told(pairs_dir):
    with pytest.raises(
        DataError, match="has 24 pairs to train on, fewer than the 7 batches of a step .*accumulate.* of 4"
    ):
        attached(pairs_dir, batch_size=4, accumulate=7, validation_fraction=0)


def test_processes_of_local_sgd_share_them_too(pairs_dir, monkeypatch):
    monkeypatch.setenv(WORLD, "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv(RANK, str(rank))
        datamodule = attached(pairs_dir, batch_size=4, validation_fraction=0.2)
        seen += keys_of(datamodule.train_dataloader())
        assert keys_of(datamodule.val_dataloader()), "only the first one validates, and it sees everything"
        assert len(keys_of(datamodule.val_dataloader())) == len(datamodule.validation)
    assert len(seen) == len(set(seen)) == 16


@pytest.mark.parametrize(("lanes", "processes", "expected"), [(8, 1, 8), (8, 2, 8), (8, 3, 9), (1, 4, 4)])
def test_lanes_are_a_multiple_of_the_processes(pairs_dir, lanes, processes, expected):
    datamodule = attached(pairs_dir, batch_size=1, lanes=lanes, world=(0, processes))
    assert datamodule.plan(processes).lanes == expected


def test_separate_validation_directory(pairs_dir):
    datamodule = attached(pairs_dir, validation_pairs=str(pairs_dir), batch_size=4)
    assert len(datamodule.training) == len(datamodule.validation) == 24


def test_two_datasets_with_the_same_keys_share_no_reference(pairs_dir, tmp_path):
    other = shutil.copytree(pairs_dir, tmp_path / "other")
    datamodule = attached(pairs_dir, validation_pairs=str(other), batch_size=4)
    training, validation = datamodule.training[0], datamodule.validation[0]
    assert training.key == validation.key
    assert not set(training.reference_ids) & set(validation.reference_ids)


def test_without_validation(pairs_dir):
    datamodule = attached(pairs_dir, validation_fraction=0, batch_size=4)
    assert datamodule.val_dataloader() == []
    assert datamodule.test_dataloader() == []
    assert datamodule.validation_samples(4) == []


def test_validation_samples_are_the_first_ones(pairs_dir):
    datamodule = attached(pairs_dir, validation_pairs=str(pairs_dir), batch_size=4)
    samples = datamodule.validation_samples(3)
    assert datamodule.collate(samples).keys == ["clip_000000", "clip_000001", "clip_000002"]
    assert len(datamodule.validation_samples(100)) == 24


def test_validation_is_the_same_for_any_number_of_processes(pairs_dir):
    def seen(processes, batch_size):
        rows = {}
        for rank in range(processes):
            datamodule = attached(
                pairs_dir, batch_size=batch_size, validation_pairs=str(pairs_dir), world=(rank, processes)
            )
            for batch in datamodule.val_dataloader():
                for row in range(len(batch)):
                    if batch.weights[row]:
                        rows[batch.keys[row]] = (batch.numbers[row].item(), batch.draws.noise[row].sum().item())
        return rows

    assert seen(1, 5) == seen(2, 4) == seen(5, 1)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_pairs_of_their_own_for_testing(pairs_dir, few_pairs_dir, stage):
    datamodule = attached("nowhere", test_pairs=str(few_pairs_dir), stage=stage)
    loader = datamodule.test_dataloader() if stage == "test" else datamodule.predict_dataloader()
    assert keys_of(loader) == [f"clip_{i:06d}" for i in range(4)]


def test_without_them_testing_takes_the_validation_pairs(pairs_dir):
    datamodule = attached(pairs_dir, validation_fraction=0.2, stage="test")
    assert keys_of(datamodule.test_dataloader()) == keys_of(datamodule.val_dataloader())


def test_lightning_validates_tests_and_predicts(pairs_dir, few_pairs_dir):
    class Notes(pl.LightningModule):
        def prepare_references(self, pictures):
            return no_pixels(pictures)

        def latent_shape(self, height, width):
            return latent_shape(height, width)

        def validation_step(self, batch, batch_index):
            seen.extend(batch.keys)

        test_step = validation_step

        def predict_step(self, batch, batch_index):
            return batch.keys

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    make = lambda: PairsDataModule(str(pairs_dir), 16, validation_fraction=0.2, test_pairs=str(few_pairs_dir))  # noqa: E731
    seen = []
    trainer.validate(Notes(), make(), verbose=False)
    assert len(seen) == len(attached(pairs_dir, validation_fraction=0.2).validation)
    seen = []
    trainer.test(Notes(), make(), verbose=False)
    four = [f"clip_{i:06d}" for i in range(4)]
    assert seen == four
    assert list(itertools.chain(*trainer.predict(Notes(), make()))) == four


def test_a_mixture_by_weight(pairs_dir, few_pairs_dir):
    sources = {str(pairs_dir): 1.0, str(few_pairs_dir): 3.0}
    datamodule = attached(sources, batch_size=4, validation_fraction=0, lanes=4)
    shards = [name.rpartition("/")[0] for batch in datamodule.train_dataloader() for name, *_ in batch.reference_ids]
    few = [str(few_pairs_dir) in name for name in shards]
    assert len(few) == 28
    assert sum(few) == 20  # three quarters of seven rows of four, to one row
    assert len(datamodule.catalogues()) == 2


def test_a_mixture_holds_pairs_of_each_out(pairs_dir, few_pairs_dir):
    datamodule = attached({str(pairs_dir): 1, str(few_pairs_dir): 1}, validation_fraction=0.2, lanes=1)
    numbers = {datamodule.validation.pairs.locate(int(index))[0] for index in datamodule.validation.indices}
    assert numbers == {0, 1}
    both = np.concatenate([datamodule.training.indices, datamodule.validation.indices])
    assert sorted(both.tolist()) == list(range(28))


@pytest.fixture
def mixed_sizes(shard_writer, tmp_path):
    """Pairs of three sizes: 10 wide, 10 high, 3 square."""
    write_shard, make_record = shard_writer
    for number, (count, size) in enumerate(((10, (96, 64)), (10, (64, 96)), (3, (80, 80)))):
        keys = [f"p{number}{i}" for i in range(count)]
        entries = [(key, make_record(key, [(0.25, 0.25, 0.75, 0.75)], size)) for key in keys]
        write_shard(tmp_path / f"pairs-{number:06d}.tar", entries, size)
    return tmp_path


def test_batches_of_one_size(mixed_sizes):
    with pytest.warns(UserWarning, match="never trained on.*3 of 64x64 pixels"):
        loader = attached(mixed_sizes, batch_size=4, bucket_step=16, validation_fraction=0).train_dataloader()
    batches = list(loader)
    assert sorted(batch.size for batch in batches) == [(48, 80)] * 2 + [(80, 48)] * 2
    for batch in batches:
        assert batch.targets.shape == (4, 3, *batch.size)
        assert batch.draws.noise.shape == (4, 4, batch.size[0] // 8, batch.size[1] // 8)
        # 96 x 64 is resized to 80 x 53, and three rows and a bit are cut off above and below
        assert set(map(tuple, batch.crops_top_left.tolist())) == ({(2, 0)} if batch.size == (48, 80) else {(0, 2)})


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_batches_of_one_size(mixed_sizes, processes):
    counted, lengths = [], set()
    for rank in range(processes):
        datamodule = attached(
            mixed_sizes, batch_size=4, bucket_step=16, validation_pairs=str(mixed_sizes), world=(rank, processes)
        )
        batches = list(datamodule.val_dataloader())
        lengths.add(len(batches))
        for batch in batches:
            counted += [key for key, weight in zip(batch.keys, batch.weights, strict=True) if weight]
    assert len(lengths) == 1
    assert len(counted) == len(set(counted)) == 23


def test_a_size_that_does_not_fit_the_model_is_told(mixed_sizes):
    datamodule = attached(mixed_sizes, batch_size=1, bucket_step=8, validation_fraction=0)

    def refuse(height, width):
        if height != width:
            raise RequestError(f"{height} x {width} has no latents")
        return latent_shape(height, width)

    datamodule.trainer.lightning_module.latent_shape = refuse
    with pytest.raises(RequestError, match=r"80 x 48 has no latents|72 x 56 has no latents"):
        datamodule.train_dataloader()


def test_references_that_change_cannot_be_kept(pairs_dir):
    datamodule = attached(pairs_dir, batch_size=4, reference_augmentation=0.5, hparams={"cache_encodings": True})
    with pytest.raises(RequestError, match="cache_encodings keeps the encoding of every reference"):
        datamodule.train_dataloader()
    attached(pairs_dir, batch_size=4, reference_augmentation=0.5, hparams={"cache_encodings": False}).train_dataloader()
    attached(pairs_dir, batch_size=4, box_jitter=0.1, hparams={"cache_encodings": True}).train_dataloader()


def test_pairs_of_single_frames_are_warned_of(shard_writer, tmp_path, recwarn):
    write_shard, make_record = shard_writer
    entries = [(f"p{i}", make_record(f"p{i}", [(0.1, 0.1, 0.9, 0.9)], (64, 64))) for i in range(10)]
    for _, record in entries[:4]:
        record["source"] = {"single_frame": True}
    write_shard(tmp_path / "pairs-000000.tar", entries, (64, 64))
    attached(tmp_path, stage="validate", validation_fraction=0.2)
    attached(tmp_path, reference_frame="target")
    assert not [warning for warning in recwarn if "copy and paste" in str(warning.message)]
    with pytest.warns(UserWarning, match="about 40% of the pairs of a dataset have references from the target"):
        attached(tmp_path)


class Store:
    """Encodings of everything."""

    parts = frozenset({"latents", "references", "text"})

    def read(self, index):
        subjects = torch.full((2, 6), float(index))
        return EncodedSample(torch.ones(4, 8, 8), None, torch.ones(3, 5), None, subjects, subjects[:, None])


def test_encodings_made_ahead_replace_pictures_but_not_those_that_are_shown(pairs_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(datamodule_file, "open_store", lambda *given: asked.append(given) or Store())
    datamodule = attached(pairs_dir, batch_size=4, validation_fraction=0.2)
    assert asked == [], "the model is not there yet"
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        batch = next(iter(loader))
        assert batch.targets is None
        indices = batch.encoded.phrase_embeddings[:, 0, 0].long().tolist()
        assert [datamodule.training.pairs.key(index) for index in indices] == batch.keys
    assert asked[0][0] is datamodule.catalogues()[0]
    assert datamodule.validation_samples(1)[0].target is not None


def test_encodings_of_a_part_of_a_mixture_are_not_used(pairs_dir, few_pairs_dir, monkeypatch):
    stores = iter([Store(), None])
    monkeypatch.setattr(datamodule_file, "open_store", lambda *_: next(stores))
    datamodule = attached({str(pairs_dir): 1, str(few_pairs_dir): 1}, batch_size=4, validation_fraction=0, lanes=1)
    assert next(iter(datamodule.train_dataloader())).encoded is None


def test_encodings_are_not_looked_for_when_off(pairs_dir, monkeypatch):
    monkeypatch.setattr(datamodule_file, "open_store", lambda *_: pytest.fail("asked"))
    datamodule = attached(pairs_dir, batch_size=4, encodings="off")
    assert next(iter(datamodule.train_dataloader())).encoded is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_dataset_gives_the_same_batches(finished_dir, serve, tmp_path, workers):
    server = serve(finished_dir)
    local = attached(finished_dir, batch_size=4, encodings="off")
    remote = attached(
        server.url, batch_size=4, encodings="off", num_workers=workers, shard_folder=str(tmp_path / "cache")
    )
    loaders = [remote.train_dataloader(), local.train_dataloader()]
    for one, other in zip(*loaders, strict=True):
        assert one.keys == other.keys
        torch.testing.assert_close(one.targets, other.targets, rtol=0, atol=0)
        torch.testing.assert_close(one.draws.noise, other.draws.noise, rtol=0, atol=0)
    assert remote._digest == local._digest, "a run may be resumed from another place of the same pairs"
    assert [server.gets(f"pairs-{number:06d}.tar") for number in range(3)] == [1, 1, 1]
    if workers:
        loaders[0]._iterator._shutdown_workers()


def test_missing_dataset(tmp_path):
    with pytest.raises(DataError, match=r"(?s)nowhere.*python -m data_pipeline\.build"):
        attached(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("world", "message"), [((0, 1), "batch of 64; mine"), ((0, 2), "batch of 64 in each of 2 processes; mine")]
)
def test_dataset_smaller_than_a_batch(pairs_dir, world, message):
    with pytest.raises(DataError, match=f"24 pairs to train on, fewer than one {message}"):
        attached(pairs_dir, batch_size=64, validation_fraction=0, world=world)
    # enough to validate on
    assert attached(pairs_dir, batch_size=64, validation_fraction=0.2, stage="validate", world=world).validation


def test_damage_is_an_error_unless_it_may_be_left_out(pairs_dir, tmp_path):
    copy = shutil.copytree(pairs_dir, tmp_path / "copy")
    shard = sorted(copy.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(DataError, match="pairs-000001.tar"):
        attached(copy, batch_size=4)
    with pytest.warns(UserWarning, match="pairs-000001.tar"):
        datamodule = attached(copy, batch_size=4, skip_damaged=True, validation_fraction=0)
    assert len(datamodule.training) == 14
    assert len(keys_of(datamodule.train_dataloader())) == 12


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_subjects": 0}, "max_subjects must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"cache_megabytes": -1}, "cache_megabytes must be at least 0"),
        ({"lanes": 0}, "lanes must be at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"resolution": 60}, "multiple of 8, got 60"),
        ({"bucket_step": -8}, "bucket_step must be at least 0"),
        ({"bucket_step": 12}, "bucket_step must be a multiple of 8, or 0 for squares, got 12"),
        ({"bucket_step": 24}, "resolution must be a multiple of bucket_step, got 64 and 24"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"minimum_visible": -0.1}, "minimum_visible must be in"),
        ({"subject_dropout": 1.1}, "subject_dropout must be in"),
        ({"box_jitter": 0.5}, "box_jitter must be in"),
        ({"reference_augmentation": -1}, "reference_augmentation must be in"),
        ({"reference_flip_probability": 2}, "reference_flip_probability must be in"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"shard_gigabytes": 0}, "shard_gigabytes must be above 0"),
        ({"crop": "left"}, "crop must be 'random' or 'center', got 'left'"),
        ({"reference_frame": "same"}, "reference_frame must be 'other' or 'target', got 'same'"),
        ({"encodings": "maybe"}, "encodings must be 'auto', 'require' or 'off', got 'maybe'"),
        ({"worker_start": "thread"}, "worker_start must be None, 'fork', 'spawn' or 'forkserver', got 'thread'"),
        ({"pairs": {}}, "pairs names no dataset"),
        ({"pairs": {"a": 1.0, "b": 0.0}}, "the weight of 'b' must be a number above 0, got 0.0"),
    ],
)
def test_bad_settings_are_told_at_construction(setting, message):
    with pytest.raises(RequestError, match=message):
        PairsDataModule(**{"pairs": "somewhere", "resolution": 64} | setting)


def test_predictions_have_their_pictures_whatever_was_encoded_ahead(monkeypatch, pairs_dir):
    """Encodings made ahead take the place of pictures in training; predictions are shown beside them."""
    asked = []
    data = PairsDataModule(str(pairs_dir), resolution=32, batch_size=2, max_subjects=2)
    monkeypatch.setattr(data, "_with_encodings", lambda dataset: asked.append(dataset) or dataset)
    monkeypatch.setattr(data, "_collator", lambda: list)
    data.setup("predict")
    data.predict_dataloader()
    assert asked == []
    data.test_dataloader()
    assert asked == [data.validation]
