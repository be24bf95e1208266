"""Checkpoints survive what happens to files: crashes, full disks, flipped bits, truncation."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from power import Disk

from mcf import checkpoint
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE


def write(run: Path, step: int, content: bytes = b"weights", **kwargs) -> Path:
    with checkpoint.save(run, step, **{"keep": 3, **kwargs}) as folder:
        (folder / "a.bin").write_bytes(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "b.bin").write_bytes(content * 2)
    return checkpoint.folder_of(run) / f"step-{step:08d}"


def test_a_save_is_whole_and_latest(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    write(tmp_path, 5)
    path = write(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == path
    files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {"a.bin": 7, "deep/b.bin": 14}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: (p / "a.bin").write_bytes(b"weighty"), "a.bin does not have the checksum"),
        (lambda p: (p / "deep/b.bin").write_bytes(b"w"), "deep/b.bin has 1 bytes, not 14"),
        (lambda p: (p / "a.bin").unlink(), "a.bin is not there"),
        (lambda p: (p / checkpoint.MANIFEST).unlink(), "the save never ended"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"files": {"a.b'), "MANIFEST.json is damaged"),
        (lambda p: (p / checkpoint.MANIFEST).write_text('{"files": {}}'), "names no files"),
    ],
)
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path, harm, said, caplog):
    before, path = write(tmp_path, 1), write(tmp_path, 2)
    harm(path)
    found, damaged = checkpoint.newest(tmp_path)
    assert found == before
    assert [d.path for d in damaged] == [path]
    assert said in damaged[0].reason
    assert said in caplog.text


def test_a_damaged_checkpoint_set_aside_does_not_crowd_out_good_ones(tmp_path):
    write(tmp_path, 1)
    (write(tmp_path, 9) / "a.bin").unlink()
    assert checkpoint.step_of(checkpoint.take_up(tmp_path)) == 1
    write(tmp_path, 2, keep=1)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path)] == [2]
    assert (checkpoint.folder_of(tmp_path) / "damaged-step-00000009").is_dir()


def test_no_flipped_bit_of_a_manifest_is_believed_or_a_traceback(tmp_path):
    before, path = write(tmp_path, 1), write(tmp_path, 2)
    manifest = path / checkpoint.MANIFEST
    sound = manifest.read_bytes()
    files = json.loads(sound)["files"]
    for bit in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        same = False  # a bit of white space, or of the case of an escape, changes nothing
        with contextlib.suppress(ValueError):
            same = json.loads(flipped) == {"files": files}
        assert checkpoint.latest(tmp_path) == (path if same else before), bit


def without_answer(file: Path) -> Path:
    """Have every read of a file fail with EIO, as address 0 of a process does; returns where its content is now."""
    kept = file.with_name("kept")
    file.rename(kept)
    file.symlink_to("/proc/self/mem")
    return kept


def test_storage_that_does_not_answer_for_a_moment_damages_nothing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    manifest = write(tmp_path, 2) / checkpoint.MANIFEST
    kept = without_answer(manifest)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            kept.replace(manifest)

    monkeypatch.setattr(checkpoint.time, "sleep", sleep)
    assert checkpoint.take_up(tmp_path) == manifest.parent
    assert pauses == [0.5, 2.0]


def test_a_checkpoint_that_alone_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (0.01,))
    before = write(tmp_path, 1)
    without_answer(write(tmp_path, 2) / checkpoint.MANIFEST)
    assert checkpoint.take_up(tmp_path) == before
    assert (checkpoint.folder_of(tmp_path) / "damaged-step-00000002").is_dir()


def test_a_run_does_not_start_again_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (0.01,))
    paths = write(tmp_path, 1), write(tmp_path, 2)
    for path in paths:
        kept = without_answer(path / checkpoint.MANIFEST)
    with pytest.raises(UserError, match=r"no checkpoint in it can be read \(Input/output error\); launch") as caught:
        checkpoint.take_up(tmp_path)
    assert caught.value.status == UNAVAILABLE  # Slurm tries again
    for path in paths:
        kept = path / "kept"
        kept.replace(path / checkpoint.MANIFEST)
        (path / "a.bin").unlink()
    with pytest.raises(
        UserError, match=r"step-00000002: a\.bin is not there; and no older .* delete .* to start again"
    ):
        checkpoint.take_up(tmp_path)
    assert checkpoint.steps(tmp_path) == list(paths)  # under their names


def test_a_leftover_that_does_not_go_is_in_no_saves_way(tmp_path):
    write(tmp_path, 1)
    busy = checkpoint.folder_of(tmp_path) / ".old-step-00000000" / "busy"
    busy.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(busy)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert write(tmp_path, 2) == checkpoint.latest(tmp_path)
    finally:
        subprocess.run(["umount", str(busy)], check=True)
    write(tmp_path, 3)
    assert not busy.parent.exists()


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(1, 11):
        write(tmp_path, step, keep=2, keep_every=4)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path)] == [4, 8, 9, 10]


def test_the_same_step_again_replaces(tmp_path):
    write(tmp_path, 1, b"old")
    path = write(tmp_path, 1, b"new")
    assert (path / "a.bin").read_bytes() == b"new"
    assert checkpoint.verify(path) is None


def test_an_error_inside_leaves_nothing_and_harms_nothing(tmp_path):
    path = write(tmp_path, 1)
    with pytest.raises(checkpoint.SaveFailed, match="No space left"), checkpoint.save(tmp_path, 2, keep=1) as folder:
        (folder / "half.bin").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), checkpoint.save(tmp_path, 3, keep=1):
        1 / 0  # noqa: B018
    assert [p.name for p in checkpoint.folder_of(tmp_path).iterdir()] == [path.name]
    assert checkpoint.latest(tmp_path) == path


def test_a_really_full_disk(tmp_path):
    """A file size limit stands for the full disk where no small file system can be mounted (EFBIG, not ENOSPC)."""
    code = f"""
import resource, signal
from pathlib import Path
from mcf import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with checkpoint.save({str(tmp_path)!r}, 2, keep=3) as folder:
        (folder / "big.bin").write_bytes(bytes(1_000_000))
except checkpoint.SaveFailed as error:
    print(error)
"""
    path = write(tmp_path, 1)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "the last whole one stands" in out
    assert checkpoint.latest(tmp_path) == path


def test_full_tmpfs(tmp_path):
    """The real thing, where mounting is allowed: ENOSPC from the file system itself."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        path = write(disk, 1)
        with (
            pytest.raises(checkpoint.SaveFailed, match=r"No space left.*free some space") as caught,
            checkpoint.save(disk, 2, keep=3) as folder,
        ):
            (folder / "big.bin").write_bytes(bytes(1_000_000))
        assert "\n" not in str(caught.value)
        assert checkpoint.latest(disk) == path
        assert write(disk, 3) == checkpoint.latest(disk)  # the space of the failed save is free again
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_killed_while_saving(tmp_path):
    """SIGKILL at many moments of a stream of saves: what is found afterwards is always whole."""
    code = f"""
from pathlib import Path
from mcf import checkpoint
for step in range(1, 10_000):
    with checkpoint.save({str(tmp_path)!r}, step, keep=2) as folder:
        for name in "abc":
            (folder / name).write_bytes(step.to_bytes(8, "big") * 20_000)
    print(step, flush=True)
"""
    for delay in (0.0, 0.01, 0.02, 0.035, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait()
        found, damaged = checkpoint.newest(tmp_path)
        assert not damaged
        step = checkpoint.step_of(found)
        assert step >= int(said[-1] if said else 1)
        assert (found / "b").read_bytes() == step.to_bytes(8, "big") * 20_000


def test_a_checkpoint_outlives_a_power_loss(tmp_path, monkeypatch):
    """All of it is on the disk before it has its name, and then its name, whatever folders are new."""
    run = tmp_path / "run"
    run.mkdir()
    disk = Disk(monkeypatch)
    write(run, 5)
    assert disk.renamed == [(".staging-step-00000005", "step-00000005")]
    assert disk.has(run)


def test_a_removal_that_is_cut_short_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def killed(folder: Path, **_) -> None:
        (folder / "a.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        write(tmp_path, 2, keep=1)
    assert [(checkpoint.step_of(p), checkpoint.verify(p)) for p in checkpoint.steps(tmp_path)] == [(2, None)]
    write(tmp_path, 3)
    assert {p.name for p in checkpoint.folder_of(tmp_path).iterdir()} == {"step-00000002", "step-00000003"}


def test_an_old_checkpoint_that_does_not_go_is_only_logged(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1)

    def busy(*_, **__) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert write(tmp_path, 2, keep=1) == checkpoint.latest(tmp_path)
    assert "step-00000001 could not be removed: Device or resource busy" in caplog.text
