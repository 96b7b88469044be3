import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from msdiffusion.generation.turns import Turns, turns_of


def test_first_come_first_served_and_one_at_a_time():
    turns, order, at_work = Turns(), [], []

    def work(number):
        with turns.take():
            at_work.append(number)
            assert len(at_work) == 1
            order.append(number)
            time.sleep(0.005)
            at_work.remove(number)

    with turns.take():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._line) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=10)
    assert order == list(range(8))


def test_a_turn_may_be_taken_again_and_is_given_back_after_an_error(in_threads):
    turns = Turns()
    with pytest.raises(KeyError), turns.take(), turns.take():
        raise KeyError
    assert in_threads(lambda: turns.take().__enter__()) == [None]


def test_nobody_waits_for_one_who_left_the_line(in_threads):
    turns = Turns()
    wait_for = turns._changed.wait_for

    def interrupted(condition):
        turns._changed.wait_for = wait_for
        raise KeyboardInterrupt

    with turns.take():
        turns._changed.wait_for = interrupted
        with pytest.raises(KeyboardInterrupt):
            in_threads(lambda: turns.take().__enter__())
        assert len(turns._line) == 1
    in_threads(lambda: turns.take().__enter__())


def test_nobody_waits_for_one_who_was_interrupted_while_joining_the_line(in_threads):
    class Line(deque):
        def append(self, thread):
            super().append(thread)
            raise KeyboardInterrupt

    turns = Turns()
    turns._line = Line()
    with pytest.raises(KeyboardInterrupt):
        turns.take().__enter__()
    assert not turns._line
    turns._line = deque()
    in_threads(lambda: turns.take().__enter__())


def test_models_on_one_network_share_its_turns():
    network, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert turns_of(network) is turns_of(network)
    assert turns_of(network) is not turns_of(other)
    assert turns_of(SimpleNamespace(_orig_mod=network)) is turns_of(network)
