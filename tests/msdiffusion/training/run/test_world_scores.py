import json
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image

from data_pipeline.world import sample_scene
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.evaluation.measures import Gallery, Instruments
from msdiffusion.evaluation.world import draw_cases
from msdiffusion.places import DEFAULT_MODEL
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.run.checkpoints import RunCheckpoint
from msdiffusion.training.run.world_scores import SCORES, WorldScores, _case, score_pictures, subjects_of

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def instruments():
    return Instruments.from_pretrained(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def gallery(instruments):
    return Gallery(instruments.recognizer, candidates=10)


@pytest.fixture
def world_pairs(shard_writer, tmp_path):
    """12 pairs of the world's scenes with 2 subjects each, as mining writes them; and their scenes."""
    write_shard, make_record = shard_writer
    rng, scenes, entries = np.random.default_rng(3), {}, []
    for i in range(12):
        scene = sample_scene(rng, num_subjects=2, size=64)
        key = f"clip_{i:06d}"
        record = make_record(key, [tuple(map(float, box)) for box in scene.boxes], (64, 64), caption=scene.caption)
        for subject, identity in zip(record["subjects"], scene.subjects, strict=True):
            subject |= {"phrase": identity.category, "attributes": identity.as_dict()}
        scenes[key] = scene
        entries.append((key, record))
    write_shard(tmp_path / "pairs-000000.tar", entries, size=(64, 64))
    return tmp_path, scenes


def data_module(pairs, **settings):
    return PairsDataModule(str(pairs), 64, batch_size=3, max_subjects=2, validation_fraction=0.5, **settings)


@pytest.mark.parametrize("settings", [{"count": 0}, {"every_n_validations": 0}, {"num_steps": 0}])
def test_wrong_numbers_are_told_at_construction(settings):
    with pytest.raises(RequestError, match=f"{next(iter(settings))} must be at least 1, got 0"):
        WorldScores(**settings)


def test_the_subjects_are_those_of_the_records(world_pairs):
    pairs, scenes = world_pairs
    data = data_module(pairs)
    data.setup("fit")
    samples = data.validation_samples(99)
    assert len(samples) > 2
    for sample, subjects in zip(samples, subjects_of(data.validation, samples), strict=True):
        scene = scenes[sample.key]
        assert [scene.subjects.index(subject) for subject in subjects] == [0, 1]


def test_true_pictures_score_high_and_noise_low(instruments, gallery):
    cases = draw_cases(pictures=12, seed=5, shares=(0.5, 0.5))
    true = score_pictures(cases, [case.truth for case in cases], instruments, gallery)
    assert tuple(true) == SCORES
    for name in ("category", "body_color", "pattern", "layout", "retrieval", "product"):
        assert true[name] > 0.7, name
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    drawn = score_pictures(cases, [Image.fromarray(pixels) for pixels in noise], instruments, gallery)
    for name in ("category", "layout", "retrieval", "product"):
        assert drawn[name] < true[name] - 0.3, name
    assert all(0 <= value <= 1 for value in (*true.values(), *drawn.values()))


def test_without_other_subjects_there_is_no_confusion(instruments, gallery):
    cases = draw_cases(pictures=2, seed=1, shares=(1.0,))
    assert "confusion" not in score_pictures(cases, [case.truth for case in cases], instruments, gallery)


def test_a_pair_becomes_a_case_without_what_it_does_not_say(world_pairs):
    data = data_module(world_pairs[0])
    data.setup("fit")
    [sample] = data.validation_samples(1)
    [subjects] = subjects_of(data.validation, [sample])
    case = _case(sample, subjects)
    assert case.subjects == tuple(subjects)
    assert np.asarray(case.boxes) == pytest.approx(sample.boxes)
    assert (np.asarray(case.truth) == sample.target).all()


def test_pairs_that_are_not_of_the_world_get_no_scores(pairs_dir):
    data = data_module(pairs_dir)
    data.setup("fit")
    assert subjects_of(data.validation, data.validation_samples(2)) is None
    callback = WorldScores()
    with pytest.warns(UserWarning, match="do not say who of the procedural world"):
        callback.setup(SimpleNamespace(is_global_zero=True, datamodule=data), None, "fit")
    logged = []
    module = SimpleNamespace(log=lambda *arguments, **named: logged.append(arguments))
    trainer = SimpleNamespace(sanity_checking=False, world_size=1, is_global_zero=True, datamodule=data)
    callback.on_validation_epoch_end(trainer, module)
    assert logged == []


def test_missing_instruments_are_told_before_the_base_is_loaded(world_pairs, tmp_path):
    data = data_module(world_pairs[0])
    data.setup("fit")
    callback = WorldScores(instruments=str(tmp_path / "none"))
    with pytest.raises(WeightsError, match="no judge at"):
        callback.setup(SimpleNamespace(is_global_zero=True, datamodule=data), None, "fit")


def test_a_run_logs_its_scores_and_its_best_weights_may_go_by_them(world_pairs, tiny_model_dir, tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, module):
            found = {name: float(v) for name, v in trainer.callback_metrics.items() if "score" in name}
            seen.append((trainer.global_step, found))

    callbacks = [
        WorldScores(count=4, every_n_validations=2, num_steps=1), Watch(),
        RunCheckpoint(every_n_steps=1, monitor="validation/score_layout", mode="max"),
    ]  # fmt: skip
    trainer = pl.Trainer(
        callbacks=callbacks, default_root_dir=tmp_path / "run", max_steps=3, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, val_check_interval=1,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    module = MSDiffusionModule(
        base_model=str(tiny_model_dir / "base"),
        image_encoder=str(tiny_model_dir / "image_encoder"),
        resampler={"width": 32, "depth": 1, "heads": 2, "head_width": 16},
    )
    trainer.fit(module, data_module(world_pairs[0]))
    assert [step for step, _ in seen if step] == [1, 2, 3]
    first, _, third = [found for step, found in seen if step]
    assert set(first) == {f"validation/score_{name}" for name in SCORES}
    assert all(0 <= value <= 1 for value in third.values())
    assert callbacks[0]._validations == 3
    assert callbacks[-1].best_score == max(first["validation/score_layout"], third["validation/score_layout"])
    resumed = WorldScores()
    resumed.load_state_dict(json.loads(json.dumps(callbacks[0].state_dict())))
    assert resumed._validations == 3
