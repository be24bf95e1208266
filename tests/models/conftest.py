"""A recipe small enough for a CPU, and a teacher for it."""

import pytest
import torch

from mcf.config import Recipe
from mcf.models import Teacher
from mcf.models.vit import VisionTransformer


@pytest.fixture
def recipe() -> Recipe:
    return make_recipe()


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(5)
    vit = VisionTransformer(image_size=32, patch_size=16, width=16, depth=3, heads=2)
    return Teacher(vit.state_dict(), heads=2, taps=(0, 2))


@pytest.fixture
def recipe_with():
    """A small recipe with sections replaced: `recipe_with(loss={"pixel": 1})`."""
    return make_recipe


def make_recipe(**sections) -> Recipe:
    model = {
        "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3,
        "decoder": {"width": 16, "depth": 1, "heads": 2}, "projection": {"hidden": 20, "dim": 8},
    }  # fmt: skip
    base = {"model": model, "train": {"precision": "fp32"}}
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(base)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
