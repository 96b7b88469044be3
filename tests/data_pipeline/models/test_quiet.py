import warnings

import pytest
from transformers.utils import logging

from data_pipeline.models.quiet import quiet_loading


@pytest.mark.parametrize("shown", [True, False])
def test_bars_and_warnings_are_off_inside_and_as_before_afterwards(shown, recwarn):
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with pytest.raises(KeyError), quiet_loading():
            assert not logging.is_progress_bar_enabled()
            warnings.warn("of a library", stacklevel=1)
            raise KeyError
        assert logging.is_progress_bar_enabled() is shown
        assert len(recwarn) == 0
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
