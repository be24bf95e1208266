"""Whose a run is: locks of other hosts, broken ones, and numbers of processes that were given away again."""

import json
import os
import socket

import psutil
import pytest

from mcf import lock
from mcf.errors import UserError


def test_a_lock_of_another_host_is_believed(tmp_path):
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": "elsewhere", "processes": [{"pid": 1, "started": 0}]}))
    with (
        pytest.raises(UserError, match=r"being trained on elsewhere \(if that is long over, delete .*lock.json\)"),
        lock.RunLock(tmp_path),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_an_empty_or_broken_lock_is_none(tmp_path, content):
    (tmp_path / lock.LOCK).write_text(content)
    with lock.RunLock(tmp_path):
        pass


def test_a_process_number_that_was_given_away_again_owns_nothing(tmp_path):
    me = {"pid": os.getpid(), "started": psutil.Process().create_time() - 100}
    (tmp_path / lock.LOCK).write_text(json.dumps({"host": socket.gethostname(), "processes": [me]}))
    with lock.RunLock(tmp_path), pytest.raises(UserError, match=f"by process {os.getpid()}"), lock.RunLock(tmp_path):
        pass
    with lock.RunLock(tmp_path):
        pass
