from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline.step import Step


@dataclass(kw_only=True)
class CountThings(Step[int, int]):
    weights: Path = Path("a/b.pt")
    words: tuple[str, ...] = ("x", "y")
    out: Path = field(default=Path("out"), metadata={"hashed": False})
    model: object = field(default=None, init=False)


def test_name_is_that_of_the_file():
    assert CountThings().name == "count_things"


def test_settings_are_json_and_leave_out_what_does_not_shape_the_dataset():
    assert CountThings().settings() == {"weights": "a/b.pt", "words": ["x", "y"]}


def test_a_step_must_say_what_it_does():
    with pytest.raises(NotImplementedError):
        CountThings().process(1)
