"""A small ViT written down a second time, with timm's names: the tests' own truth about what weights compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcf import checkpoint, state
from mcf.config import Recipe
from mcf.models.mcf import MCF
from mcf.models.momentum import MomentumBranch


@dataclass(frozen=True)
class SmallViT:
    """Makes state dicts of a plain ViT, and computes what they mean without any code of the project."""

    width: int = 48
    depth: int = 3
    heads: int = 3
    patch: int = 8
    grid: int = 4

    @property
    def image_size(self) -> int:
        return self.patch * self.grid

    @property
    def model(self) -> dict[str, int]:
        """A recipe's keys of a model with this encoder."""
        return {
            "image_size": self.image_size, "patch_size": self.patch, "width": self.width, "depth": self.depth,
            "heads": self.heads,
        }  # fmt: skip

    def state(self, seed: int = 0) -> dict[str, Tensor]:
        """Random weights in which no tensor is zero or one, so that a swapped or forgotten one shows."""
        rng = torch.Generator().manual_seed(seed)
        c, p = self.width, self.patch

        def draw(*shape: int) -> Tensor:
            return 0.2 * torch.randn(shape, generator=rng)

        state = {"cls_token": draw(1, 1, c), "pos_embed": draw(1, 1 + self.grid**2, c)}
        state |= {"patch_embed.proj.weight": draw(c, 3, p, p), "patch_embed.proj.bias": draw(c)}
        for i in range(self.depth):
            for name, out, into in (
                ("attn.qkv", 3 * c, c),
                ("attn.proj", c, c),
                ("mlp.fc1", 4 * c, c),
                ("mlp.fc2", c, 4 * c),
            ):
                state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = draw(out, into), draw(out)
            for name in ("norm1", "norm2"):
                state[f"blocks.{i}.{name}.weight"], state[f"blocks.{i}.{name}.bias"] = 1 + draw(c), draw(c)
        return state | {"norm.weight": 1 + draw(c), "norm.bias": draw(c)}

    def blocks(self, state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """Outputs [B, 1+L, C] of every block for normalised images [B, 3, H, W]."""
        norm = lambda x, name: F.layer_norm(x, (self.width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)  # noqa: E731
        linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
        x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=self.patch)
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + state["pos_embed"]
        outputs = []
        for i in range(self.depth):
            b, n, c = x.shape
            q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
            q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
            weights = torch.softmax(q @ k.mT / (c // self.heads) ** 0.5, dim=-1)
            x = x + linear((weights @ v).transpose(1, 2).reshape(b, n, c), f"blocks.{i}.attn.proj")
            hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
            x = x + linear(hidden, f"blocks.{i}.mlp.fc2")
            outputs.append(x)
        return outputs

    def forward(self, state: dict[str, Tensor], images: Tensor) -> Tensor:
        """All tokens after the final norm."""
        return F.layer_norm(
            self.blocks(state, images)[-1], (self.width,), state["norm.weight"], state["norm.bias"], 1e-6
        )


@pytest.fixture
def vit() -> SmallViT:
    return SmallViT()


@pytest.fixture
def one_line() -> Callable[[object], str]:
    """The text of a user's error, after making sure that it is one short line without a traceback's look."""

    def check(error: object) -> str:
        text = str(error)
        assert "\n" not in text and "Traceback" not in text
        assert len(text) < 600
        return text

    return check


@pytest.fixture
def trained(tmp_path):
    """(run directory, student, momentum branch) of a small run whose two branches differ, saved as training saves it."""
    recipe = Recipe.model_validate({
        "model": {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 3,
                  "decoder": {"width": 32, "depth": 1, "heads": 2}, "projection": {"hidden": 16, "dim": 8}},
    })  # fmt: skip
    torch.manual_seed(3)
    student = MCF(recipe.model)
    momentum = MomentumBranch(student)
    with torch.no_grad():
        for module in (student, momentum):
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    engine = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    with checkpoint.save(tmp_path / "run", 5, keep=1) as folder:
        state.write(
            folder, recipe, state.Progress(step=5), engine | {"exp_avg.x": torch.zeros(1)}, momentum.state_dict()
        )
    return tmp_path / "run", student, momentum
