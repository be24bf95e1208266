"""The guard counts bad steps, writes down their samples, and ends a run that does not recover."""

from __future__ import annotations

import json

import pytest
import torch

from mcf.config import GuardConfig
from mcf.errors import UserError
from mcf.guard import Guard, memory_suffices


def test_bad_steps_are_written_down_and_a_good_one_resets(tmp_path):
    guard = Guard(GuardConfig(max_bad_steps=3), tmp_path, rank=1)
    guard.observe(1, True, ["a"])
    guard.observe(2, False, ["b", "c"], {"grad_norm": float("nan")})
    guard.observe(3, False, ["d"])
    guard.observe(4, True, ["e"])
    guard.observe(5, False, ["f"])
    guard.observe(6, False, ["g"])
    assert guard.in_a_row == 2
    written = sorted((tmp_path / "bad_steps").iterdir())
    assert [p.name for p in written] == [f"step-{s:08d}.rank1.json" for s in (2, 3, 5, 6)]
    assert json.loads(written[0].read_text()) == {
        "step": 2,
        "rank": 1,
        "numbers": {"grad_norm": "nan"},
        "keys": ["b", "c"],
    }
    with pytest.raises(UserError, match=r"step 7: 3 non-finite steps in a row .*bad_steps"):
        guard.observe(7, False, ["h"])


def test_an_unwritable_folder_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "bad_steps").write_text("a file where the folder should be")
    Guard(GuardConfig(), tmp_path, rank=0).observe(1, False, ["a"])
    assert "could not be written" in caplog.text


def test_collapse_is_told_once_a_fall(tmp_path):
    guard = Guard(GuardConfig(collapse_std=0.2), tmp_path, rank=0)
    told = [guard.watch_collapse(spread) for spread in [1.0, 0.1, 0.1, 0.9, 0.05]]
    assert [bool(line) for line in told] == [False, True, False, False, True]
    assert told[1] == "the queries are collapsing: their spread is 0.100 of an even one (guard.collapse_std=0.2)"


def test_memory_that_does_not_suffice_for_the_first_step_is_the_users_to_mend():
    full = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"
    with (
        pytest.raises(
            UserError,
            match=r"^micro_batch=64: .*for a step \(CUDA out of memory\. .* GiB\.\); use a smaller one, or freeze=true$",
        ),
        memory_suffices(64, first=True, instead="freeze=true"),
    ):
        raise torch.OutOfMemoryError(full)
    with pytest.raises(torch.OutOfMemoryError), memory_suffices(64, first=False, instead="freeze=true"):
        raise torch.OutOfMemoryError(full)


@pytest.mark.parametrize(
    ("said", "lacks"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error: Last error:\nFailed to CUDA malloc 4194304 bytes", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_every_library_says_in_its_own_words_that_memory_does_not_suffice(said, lacks):
    with pytest.raises(UserError if lacks else RuntimeError) as error, memory_suffices(8, first=True, instead="x"):
        raise RuntimeError(said)
    assert isinstance(error.value, UserError) == lacks
