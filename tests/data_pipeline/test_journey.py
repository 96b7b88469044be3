"""A clip on its way: batches, pairs that part, errors that stay with the pair that set them off."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from data_pipeline.errors import ClipError
from data_pipeline.journal import Journal
from data_pipeline.journey import Branch, Journey, advance, commit, outcome, travel
from data_pipeline.records import Dropped, EncodedPair, NamedPair, Rejected, VideoFile
from data_pipeline.step import Step


@dataclass(kw_only=True)
class Split(Step):
    """One record per letter of the clip's key."""

    def process(self, record):
        return tuple(record.key)


@dataclass(kw_only=True)
class Judge(Step):
    def process(self, record):
        if record == "b":
            raise ClipError("bad", value=3)
        if record == "n":
            return Rejected("not wanted", {"value": 4})
        if record == "x":
            raise KeyError("oops")
        return record


@dataclass(kw_only=True)
class Encode(Step):
    def process(self, record):
        if record == "z":
            return Rejected("late", {})
        lost = Dropped(phrase="dog", stage="judge", reason="small", evidence={})
        return EncodedPair(samples=({"key": record},), blocks=record.encode(), dropped=(lost,))


STEPS = [Split(), Judge(), Encode()]


@pytest.fixture
def make_journey(tmp_path):
    def make(key):
        path = tmp_path / f"{key}.mp4"
        path.write_bytes(b"x")
        return Journey(VideoFile(name=path.name, key=key, path=path, caption="a dog"))

    return make


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    return journal


def test_a_clip_with_one_pair(make_journey):
    journey = travel(STEPS, make_journey("a"))
    assert outcome(journey).samples == ({"key": "a"},)
    assert list(journey.seconds) == ["split", "judge", "encode"]


def test_pairs_part_and_their_samples_come_together_in_order(make_journey, journal):
    journey = travel(STEPS, make_journey("acd"))
    result = outcome(journey)
    assert [sample["key"] for sample in result.samples] == ["a", "c", "d"]
    assert result.blocks == b"acd"
    assert len(result.dropped) == 3
    assert commit(journey, journal).kept
    assert journal.blocks("acd") == b"acd"
    assert journal.read(journey.file)["lost_pairs"] == []


@pytest.mark.parametrize(
    ("key", "kept", "lost"),
    [
        ("ab", ["a"], [{"number": 1, "stage": "judge", "reason": "bad", "evidence": {"value": 3}}]),
        ("na", ["a"], [{"number": 0, "stage": "judge", "reason": "not wanted", "evidence": {"value": 4}}]),
        ("az", ["a"], [{"number": 1, "stage": "encode", "reason": "late", "evidence": {}}]),
    ],
)
def test_a_pair_that_falls_out_leaves_the_others(make_journey, journal, key, kept, lost):
    journey = travel(STEPS, make_journey(key))
    assert commit(journey, journal).kept
    marker = journal.read(journey.file)
    assert [sample["key"] for sample in marker["samples"]] == kept
    assert marker["lost_pairs"] == lost


def test_a_rejected_clip_gives_the_reason_of_the_pair_that_came_farthest(make_journey, journal):
    journey = travel(STEPS, make_journey("bzn"))
    assert not commit(journey, journal).kept
    marker = journal.read(journey.file)
    assert (marker["stage"], marker["reason"]) == ("encode", "late")
    assert [(lost["number"], lost["reason"]) for lost in marker["lost_pairs"]] == [(0, "bad"), (2, "not wanted")]


def test_of_pairs_that_came_equally_far_the_best_one_speaks(make_journey):
    assert outcome(travel(STEPS, make_journey("nb"))).reason == "not wanted"


def test_an_error_that_nobody_foresaw_keeps_its_traceback_and_hits_no_other_pair(make_journey, journal):
    journey = travel(STEPS, make_journey("axc"))
    finished = commit(journey, journal)
    assert finished.kept
    assert "KeyError: 'oops'" in finished.unexpected
    [lost] = journal.read(journey.file)["lost_pairs"]
    assert lost["evidence"]["error"] == "KeyError: 'oops'"
    assert [sample["key"] for sample in journal.read(journey.file)["samples"]] == ["a", "c"]


@dataclass(kw_only=True)
class Batched(Step):
    """Notes the batches that it is given; one bad record breaks the whole batch, as a model would."""

    seen: list

    def process_many(self, records):
        self.seen.append(list(records))
        if "x" in records:
            raise RuntimeError("the batch is broken")
        return [record.upper() for record in records]


def test_a_batch_holds_the_living_pairs_of_all_clips(make_journey):
    journeys = [make_journey("ab"), make_journey("n"), make_journey("c")]
    for step in (Split(), Judge()):
        advance(step, journeys)
    seen = []
    advance(Batched(seen=seen), journeys)
    assert seen == [["a", "c"]]
    assert [[branch.record for branch in journey.branches if branch.alive] for journey in journeys] == [
        ["A"],
        [],
        ["C"],
    ]


def test_a_broken_batch_is_taken_again_one_by_one(make_journey):
    seen = []
    journeys = [Journey(make_journey(key).file, [Branch(key)]) for key in "axc"]
    advance(Batched(seen=seen), journeys)
    assert seen == [["a", "x", "c"], ["a"], ["x"], ["c"]]
    assert [journey.alive for journey in journeys] == [True, False, True]
    assert journeys[1].branches[0].record.reason == "unexpected error"


def test_an_unexpected_error_says_which_caption_it_met(make_pair, make_entity):
    pair = make_pair(*[np.zeros((8, 8, 3), dtype=np.uint8)] * 2, caption="written by a captioner")
    records = [pair, NamedPair(frames=pair, entities=(make_entity(),)), pair.video, pair.video.file]
    journeys = [Journey(pair.video.file, [Branch(record)]) for record in records]
    for journey in journeys:
        advance(Forgetful(), [journey])
    captions = [journey.branches[0].record.evidence["caption"] for journey in journeys]
    assert captions == ["written by a captioner"] * 3 + ["a dog on the beach"]


@dataclass(kw_only=True)
class Remark(Step):
    def process(self, record):
        return (replace(record, notes=("HDR", "interlaced")), record)


def test_what_records_say_of_their_clip_is_kept_whatever_becomes_of_it(make_journey, make_pair, journal):
    video = make_pair(*[np.zeros((8, 8, 3), dtype=np.uint8)] * 2).video
    journey = Journey(make_journey("a").file, [Branch(video)])
    assert not commit(travel([Remark(), Remark(), Forgetful()], journey), journal).kept
    assert journal.read(journey.file)["notes"] == ["HDR", "interlaced"]
    plain = make_journey("c")
    assert commit(travel(STEPS, plain), journal).kept
    assert journal.read(plain.file)["notes"] == []


@dataclass(kw_only=True)
class Forgetful(Step):
    def process_many(self, records):
        return []


def test_a_step_that_loses_a_record_is_found_out(make_journey):
    journey = Journey(make_journey("a").file)
    advance(Forgetful(), [journey])
    assert "gave 0 results for 1 records" in outcome(journey).evidence["traceback"]


def test_a_clip_that_changes_while_it_is_worked_on_is_not_taken_for_the_new_one(make_journey, journal):
    journey = make_journey("a")
    journey.file.path.write_bytes(b"another film")
    assert commit(travel(STEPS, journey), journal).kept
    assert journal.read(journey.file) is None


def test_a_finished_clip_is_not_touched_again(make_journey):
    journey = make_journey("n")
    travel(STEPS, journey)
    seen = []
    advance(Batched(seen=seen), [journey])
    assert seen == []
