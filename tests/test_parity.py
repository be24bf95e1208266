"""Parity with golden numbers: the given ones, and ones from an independent reference at other sizes and on two ranks."""

import json

import plain_reference
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcf.parity import __main__ as parity
from mcf.parity.comparing import Row, relative_error
from mcf.parity.step import one_ulp

WIDER = {
    **plain_reference.SMALL, "patch_size": 16, "embed_dim": 40, "depth": 3, "num_heads": 5, "decoder_embed_dim": 24,
    "decoder_depth": 2, "decoder_num_heads": 3, "proj_dim": 16, "proj_hidden": 36,
    "teacher": {"patch_size": 8, "embed_dim": 24, "depth": 13, "num_heads": 2},
}  # fmt: skip


def status(folder, *arguments) -> int:
    return parity.main([f"golden={folder}", *arguments])


def change(path, edit) -> None:
    """Rewrite a golden file after `edit(tensors, config)`."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    edit(tensors, config)
    save_file(tensors, path, {"config": json.dumps(config)})


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    plain_reference.write(folder)
    return folder


@pytest.fixture
def copy(golden, tmp_path):
    (tmp_path / "rank0.safetensors").write_bytes((golden / "rank0.safetensors").read_bytes())
    return tmp_path / "rank0.safetensors"


def test_the_given_golden_numbers(golden_dir, capsys):
    assert status(golden_dir) == 0
    text = capsys.readouterr().out
    # Every output, every gradient and the whole momentum branch are rows of the table.
    with safe_open(golden_dir / "rank0.safetensors", "pt") as file:
        expected = {n for n in file.keys() if not n.startswith(("before.", "noise_", "u8"))}  # noqa: SIM118
    assert expected == {line.split()[1] for line in text.splitlines()[1:-1]}
    assert text.splitlines()[-1].endswith(", 0 over")


def test_an_independent_reference_at_other_sizes(golden, tmp_path, capsys):
    assert status(golden) == 0
    plain_reference.write(tmp_path, config=WIDER, size=48, batch=5, seed=8)
    assert status(tmp_path) == 0, capsys.readouterr().out


def test_two_ranks_in_two_processes(tmp_path, capfd):
    plain_reference.write(tmp_path, world=2)
    assert status(tmp_path) == 0
    text = capfd.readouterr().out
    for name in ("q", "k", "con", "mim", "loss"):
        assert {int(line.split()[0]) for line in text.splitlines() if line.split()[1] == name} == {0, 1}

    # Keys that were not gathered, or gradients of one rank alone, would show: rank 1 is not rank 0.
    change(tmp_path / "rank1.safetensors", lambda t, _: t["con"].mul_(1 + 1e-4))
    assert status(tmp_path) == 1
    over = [line.split()[:2] for line in capfd.readouterr().out.splitlines() if line.endswith("OVER")]
    assert over == [["1", "con"]]


@pytest.mark.parametrize(
    "name",
    [
        "pred", "mask", "q", "k", "mim", "con", "loss", "grad.mask_token", "grad.predictor.1.bias",
        "grad.online_encoder.blocks.1.attn.qkv.bias", "after.target_encoder.fc.4.running_var",
        "after.target_encoder.fc.1.num_batches_tracked", "after.target_encoder.blocks.0.mlp.fc1.weight",
    ],
)  # fmt: skip
def test_one_changed_number_fails(copy, name, capsys):
    def edit(tensors, _):
        flat = tensors[name].view(-1)
        index = flat.abs().argmax()
        flat[index] = flat[index] * (1 + 1e-4) if flat.is_floating_point() else flat[index] + 1

    change(copy, edit)
    assert status(copy.parent) == 1
    over = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.endswith("OVER")]
    assert over == [name]


def test_rounding_excuses_no_mistake(golden_dir, tmp_path, capsys):
    """Its worst gradients are open by about 1e-4; ten times that is a mistake, whichever processor looks."""
    for file in golden_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path / "rank0.safetensors", lambda t, _: t["grad.predictor.0.weight"].mul_(1 + 1e-3))
    assert status(tmp_path) == 1
    over = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.endswith("OVER")]
    assert over == ["grad.predictor.0.weight"]


def test_what_rounding_may_excuse_is_bounded():
    assert not Row(0, "x", error=9e-4, rounding=1e-3).over(1e-5)
    assert Row(0, "x", error=2e-3, rounding=float("inf")).over(1e-5)
    assert Row(0, "x", error=float("inf"), rounding=float("inf")).over(1e-5)


def test_one_ulp_moves_every_number_but_zeros_by_one_place():
    state = {"w": torch.tensor([1.0, -3.0, 0.0]), "n": torch.tensor(7)}
    moved = one_ulp(state, seed=0)
    assert moved["w"][2] == 0 and moved["n"] == 7
    back = torch.nextafter(moved["w"][:2], state["w"][:2])
    assert torch.equal(back, state["w"][:2]) and (moved["w"][:2] != state["w"][:2]).all()


def test_not_a_number_is_no_agreement(copy):
    change(copy, lambda t, _: t["q"].view(-1)[:1].fill_(float("nan")))
    assert status(copy.parent) == 1


def test_the_tolerance_is_an_argument(copy):
    change(copy, lambda t, _: t["con"].mul_(1 + 1e-4))
    assert status(copy.parent, "tolerance=1e-3") == 0


def test_another_momentum_or_weight_in_the_state_is_noticed(copy):
    change(copy, lambda t, _: t["before.target_encoder.fc.0.weight"].add_(1e-3))
    assert status(copy.parent) == 1


def _drop(name):
    return lambda tensors, _: tensors.pop(name)


@pytest.mark.parametrize(
    "edit, message",
    [
        (_drop("k"), "has no k"),
        (_drop("grad.mask_token"), "has no grad.mask_token"),
        (_drop("before.predictor.0.weight"), "does not fit its configuration"),
        (lambda t, c: c.update(embed_dim=25), "not usable"),
        (lambda t, c: c.update(depth=5), "does not fit its configuration"),
        (lambda t, c: c.pop("teacher"), "not usable"),
        (lambda t, c: c.update(world=2), "of 2 ranks"),
    ],
)
def test_damaged_contents_are_one_line(copy, edit, message, capsys):
    change(copy, edit)
    assert status(copy.parent) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(copy.parent) in error


def test_missing_and_truncated_files_are_one_line(copy, tmp_path, capsys):
    assert status(tmp_path / "nowhere") == 2
    copy.write_bytes(copy.read_bytes()[:-100])
    assert status(copy.parent) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no rank0.safetensors" in lines[0] and "damaged" in lines[1]


def test_relative_error():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.5])
    assert relative_error(a, b) == pytest.approx(0.5 / 2.5)
    assert relative_error(a, b, floor=5.0) == pytest.approx(0.1)
    assert relative_error(a, a[:1]) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(a, torch.zeros(2)) == float("inf")
