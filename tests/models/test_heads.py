"""The heads: their layers, and BatchNorm over several ranks against one big batch."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mcf.config import HeadsConfig
from mcf.errors import UserError
from mcf.models.heads import BatchNorm, predictor, projector

WIDTH, ROWS = 6, (3, 5)


def test_heads_are_the_references_layers():
    def kinds(head):
        return [(type(m).__mro__[1] if type(m).__module__.startswith("mcf") else type(m)).__name__ for m in head]

    config = HeadsConfig(hidden=20, dim=8)
    both = projector(12, config), predictor(config)
    assert kinds(both[0]) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert kinds(both[1]) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in both[0].parameters()] == [(20, 12), (20,), (20,), (8, 20)]
    assert [tuple(p.shape) for p in both[1].parameters()] == [(20, 8), (20,), (20,), (8, 20)]


def test_batch_norm_is_float32_under_autocast():
    x = (100 + torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))).bfloat16()
    ours, theirs = BatchNorm(WIDTH), nn.BatchNorm1d(WIDTH).double()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.float32
    # Offset 100 against a deviation of 1 costs float32 two of its seven digits; bfloat16 would have none left.
    torch.testing.assert_close(y.double(), theirs(x.double()), rtol=0, atol=1e-4)


def test_a_single_sample_is_one_line():
    with pytest.raises(UserError, match=r"single sample.*raise micro_batch.*batch_norm=synchronised"):
        BatchNorm(WIDTH)(torch.randn(1, WIDTH))
    assert BatchNorm(WIDTH).eval()(torch.randn(1, WIDTH)).shape == (1, WIDTH)


def _everything(rank: int, world: int) -> dict[str, list]:
    """Two steps of a head with synchronised BatchNorm on this rank's rows: outputs, gradients, running statistics."""
    torch.manual_seed(0)
    head = projector(WIDTH, HeadsConfig(hidden=7, dim=4, batch_norm="synchronised"))
    rows = 50 + 10 * torch.randn(2, sum(ROWS), WIDTH, generator=torch.Generator().manual_seed(1))
    target = torch.randn(sum(ROWS), 4, generator=torch.Generator().manual_seed(2))
    first = sum(ROWS[:rank]) if world > 1 else 0
    mine = slice(first, first + ROWS[rank]) if world > 1 else slice(None)
    inputs = rows[:, mine].clone().requires_grad_()
    outputs = [head(x) for x in inputs]
    # The loss of all rows is the sum of the ranks' losses.
    sum(((y - target[mine]) ** 3).sum() for y in outputs).backward()
    found = {"outputs": torch.stack(outputs).transpose(0, 1), "inputs": inputs.grad.transpose(0, 1)}
    for name, parameter in head.named_parameters():
        gradient = parameter.grad.clone()
        if world > 1:
            dist.all_reduce(gradient)
        found[name] = gradient
    found |= dict(head.named_buffers())
    head.eval()
    found["evaluated"] = head(rows[0])
    return {name: tensor.tolist() for name, tensor in found.items()}


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = _everything(rank, 2)
    try:
        BatchNorm(WIDTH, synchronised=True)(torch.randn(1 - rank, WIDTH))
    except UserError as error:
        result["alone"] = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:  # noqa: PTH123
        json.dump(result, file)
    dist.destroy_process_group()


def test_synchronised_over_two_ranks_is_one_big_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    whole = _everything(0, 1)
    for name, expected in whole.items():
        expected = torch.tensor(expected)
        # Unequal ranks (3 and 5 rows): outputs and input gradients are of each rank's rows, the rest is of all.
        got = [torch.tensor(r[name]) for r in ranks]
        got = torch.cat(got) if name in ("outputs", "inputs") else got
        for tensor in got if isinstance(got, list) else [got]:
            # Sums over 8 rows in another order; gradients through two BatchNorms lose a digit to cancellation.
            scale = float(expected.abs().max())
            assert float((tensor - expected).abs().max()) <= 2e-5 * max(scale, 1e-3), name
    assert all("all ranks together has a single sample" in r["alone"] for r in ranks)
