"""Calls from several threads take turns on the networks that they share, first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary


class Turns:
    """A lock that is given to those who wait in the order in which they came; whoever has it may take it again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[int] = deque()  # identifiers of threads: the first is at work, the others wait

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn and keep it for the body."""
        thread = threading.get_ident()
        with self._changed:
            again = bool(self._line) and self._line[0] == thread
        if again:
            yield
            return
        try:
            with self._changed:
                self._line.append(thread)
                self._changed.wait_for(lambda: self._line[0] == thread)
            yield
        finally:  # also of Ctrl+C at any place above: nobody may wait for one who has left
            with self._changed:
                if thread in self._line:
                    self._line.remove(thread)
                    self._changed.notify_all()


_TURNS: WeakKeyDictionary[Any, Turns] = WeakKeyDictionary()
_MAKING = threading.Lock()


def turns_of(network: Any) -> Turns:
    """The turns of a network, the same for every model and pipeline that it is part of."""
    with _MAKING:
        return _TURNS.setdefault(getattr(network, "_orig_mod", network), Turns())  # torch.compile wraps it
