import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException

from msdiffusion.training.run.foreign_words import NO_GPU, in_one_sentence, told_by_lightning

UNION = """Parser key "trainer.logger":

  - Expected a path but Foo either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [<class 'Logger'>, <class 'bool'>, <class 'NoneType'>]
  Errors:
    - Expected a dot import path string: Foo
    - Expected a <class 'bool'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: Foo
"""
OBJECT = """Parser key "model":
  Does not validate against any of the Union subtypes
  Errors:
    - Problem with given class_path 'a.Module':
        %s
    - Expected a <class 'NoneType'>
  Given value type: <class 'Namespace'>
  Given value: Namespace(class_path='a.Module', init_args=Namespace(name=None))
"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ('Parser key "seed":\n  Expected a <class \'int\'>. Got value: 1.5', "seed must be a whole number, got 1.5"),
        (UNION, "trainer.logger must be the name of a class or true or false, got Foo"),
        (OBJECT % "Option 'lr' is not accepted", "model: a.Module: Option 'lr' is not accepted"),
        (OBJECT % "Parser key \"rate\":\n          Expected a <class 'float'>. Got value: abc",
         "model.init_args.rate must be a number, got abc"),
        (OBJECT % "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip`",
         "a.Module needs wandb, which is not installed: pip install wandb"),
        ("the following arguments are required:\n fit.data", "the following arguments are required: fit.data"),
    ],
)  # fmt: skip
def test_one_sentence(message, told):
    assert in_one_sentence(message) == told


def test_a_long_one_is_cut_off():
    assert len(in_one_sentence("x" * 9000)) == 400


def test_only_what_lightning_says_is_taken_for_its_words():
    assert told_by_lightning(MisconfigurationException("two\n  lines")) == "two lines"
    assert told_by_lightning(MisconfigurationException("No supported gpu backend found!")) == NO_GPU
    try:
        raise ValueError("of somebody's module")
    except ValueError as error:
        assert told_by_lightning(error) is None
    assert told_by_lightning(KeyError("a")) is None
