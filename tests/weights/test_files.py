"""Files of weights: every way to be unreadable is one line, and opening one never runs code."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mcf.errors import UserError
from mcf.weights import files


class RunsCode:
    """A pickle of this creates a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_both_formats_come_back_as_they_went(tmp_path):
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5.0).to(torch.bfloat16)}
    for name in ("w.safetensors", "w.pth"):
        files.write(tmp_path / name, tensors, {"heads": "12"})
        opened = files.read(tmp_path / name, where="w")
        assert opened.content.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert opened.content[key].dtype == tensor.dtype
            assert torch.equal(opened.content[key], tensor)
    assert files.read(tmp_path / "w.safetensors", where="w").metadata["heads"] == "12"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_umask_says_who_may_read_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for name in ("w.safetensors", "w.pth"):
            files.write(tmp_path / name, {"a": torch.ones(1)}, {})
        files.write(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, {})  # over one that is there
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == [mode, mode]


def test_views_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    files.write(tmp_path / "w.safetensors", {"t": whole.mT, "again": whole}, {})
    assert torch.equal(files.read(tmp_path / "w.safetensors", where="w").content["t"], whole.mT)


def _bad_files(folder: Path) -> dict[str, Path]:
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(64)}
    save_file(tensors, folder / "good.safetensors")
    torch.save(tensors, folder / "good.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)

    def cut(name: str, share: float) -> Path:
        content = (folder / name).read_bytes()
        path = folder / f"cut-{share}-{name}"
        path.write_bytes(content[: int(len(content) * share)])
        return path

    (folder / "empty.pth").touch()
    (folder / "photo.pth").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500))
    (folder / "words.pth").write_text("404: not found\n" * 40)
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    torch.save([torch.zeros(2)], folder / "list.pth")
    (folder / "header.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{" + bytes(100))
    return {
        "no such file": folder / "nowhere.pth",
        "is a directory": folder,
        "empty": folder / "empty.pth",
        "neither safetensors nor": folder / "photo.pth",
        "neither": folder / "words.pth",
        "not a PyTorch file": folder / "arrays.npz",
        "holds a list": folder / "list.pth",
        "damaged safetensors": cut("good.safetensors", 0.5),
        "truncated or damaged safetensors": folder / "header.safetensors",
        "truncated or damaged file": cut("good.pth", 0.5),
        "truncated": cut("good.pth", 0.99),
        "truncated or damaged PyTorch file": cut("legacy.pth", 0.5),
    }


def test_each_unreadable_file_is_one_line(tmp_path, one_line):
    for expected, path in _bad_files(tmp_path).items():
        with pytest.raises(UserError) as error:
            files.read(path, where=f"teacher.path={path}")
        assert expected in one_line(error.value), path
        assert str(error.value).startswith(f"teacher.path={path}: ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path, one_line, zipped):
    proof, path = tmp_path / "it-ran", tmp_path / "evil.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "x": RunsCode(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        files.read(path, where="teacher.path=evil.pth")
    message = one_line(error.value)
    assert "mkdir" in message and "mcf.convert" in message and "trust=true" in message
    assert not proof.exists()
    files.read(path, where="teacher.path=evil.pth", trust=True)
    assert proof.exists(), "trust must open what it was said to trust"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("trust", [False, True])
def test_a_pickle_that_is_not_of_torch_is_called_so_and_does_not_run(tmp_path, one_line, protocol, trust):
    """torch itself runs one that is trusted before it sees that it cannot read it."""
    proof, path = tmp_path / "it-ran", tmp_path / "p.pkl"
    for content in ({"a": np.zeros(3)}, {"a": RunsCode(proof)}):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(UserError, match=r"^p: a pickle that torch\.save has not written, and .* run code") as error:
            files.read(path, where="p", trust=trust)
        one_line(error.value)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_old_versions_of_torch_are_read(tmp_path, protocol):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert files.read(path, where="old", trust=protocol > 2).content["a"].tolist() == [1, 1]


def test_a_command_line_beside_the_weights_is_harmless(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "mae.pth")
    assert files.read(tmp_path / "mae.pth", where="mae").content["model"]["a"] == 1


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, one_line):
    path = tmp_path / "w.safetensors"
    files.write(path, {"a": torch.ones(1)}, {})

    def full(*_args, **_kwargs):
        path.with_name(f"{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(UserError) as error:
        files.write(path, {"a": torch.zeros(1)}, {})
    assert "No space left" in one_line(error.value)
    monkeypatch.undo()
    assert files.read(path, where="w").content["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_writing_into_no_folder_is_one_line(tmp_path, one_line):
    for path in (tmp_path, tmp_path / "missing" / "w.safetensors"):
        with pytest.raises(UserError) as error:
            files.write(path, {"a": torch.ones(1)}, {})
        assert f"out={path}" in one_line(error.value)
