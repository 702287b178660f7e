"""Threads in the place of a run's processes, for what they agree on without arrays."""

import threading
from concurrent.futures import ThreadPoolExecutor

from rwkv7_jax.runs.process_group import AllProcesses

# Seconds until a member gives up that makes an exchange which the others do not make.
_PATIENCE = 60


class Member(AllProcesses):
    """A process of the group."""

    def __init__(self, index, barrier, table):
        self.index = index
        self.is_primary = index == 0
        self.members = tuple(range(barrier.parties))
        self.exchanges = 0
        self._barrier = barrier
        self._table = table

    def allgather(self, value):
        """Exchanges the values of all threads."""
        self.exchanges += 1
        self._table[self.index] = value
        self._barrier.wait(_PATIENCE)
        values = list(self._table)
        self._barrier.wait(_PATIENCE)
        return values


def run_as_processes(call, count=2):
    """Calls a function in each member; returns each result or error, and the members."""
    barrier = threading.Barrier(count)
    table = [None] * count
    members = [Member(index, barrier, table) for index in range(count)]

    def outcome(member):
        try:
            return call(member)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(outcome, members)), members
