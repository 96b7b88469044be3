from data_pipeline.report import Tally


def marker(kept, **changes):
    seconds = {"read": 0.1, "filter": 0.2}
    if kept:
        samples = [{"subjects": [{}, {}]}]
        dropped = [{"phrase": "cat", "stage": "filter", "reason": "box too small", "evidence": {}}]
        return {"key": "a", "kept": True, "samples": samples, "dropped": dropped, "seconds": seconds, **changes}
    return {"key": "b", "kept": False, "stage": "read", "reason": "empty file", "seconds": {"read": 0.1}, **changes}


def test_tally():
    tally = Tally(["read", "filter", "write"])
    for each in (marker(True), marker(False), marker(False), marker(False, stage="filter", reason="no subject")):
        tally.add(each, examples=1)
    assert (tally.videos, tally.samples, tally.subjects) == (4, 1, 2)
    assert tally.reached == {"read": 4, "filter": 2, "write": 1}
    assert tally.rejected == {"read": {"empty file": 2}, "filter": {"no subject": 1}}
    assert tally.dropped == {("filter", "box too small"): 1}
    assert tally.subject_counts == {2: 1}
    assert len(tally.rejected_markers["read", "empty file"]) == 1
