"""The teacher: frozen for good, gradient through it, position tables of other sizes."""

import pytest
import torch
import torch.nn.functional as F

from mcf.errors import UserError
from mcf.models import Teacher
from mcf.models.patches import normalise
from mcf.models.vit import VisionTransformer


def state(size=32, patch=8, depth=3, hidden=4.0):
    torch.manual_seed(2)
    vit = VisionTransformer(image_size=size, patch_size=patch, width=16, depth=depth, heads=2, mlp_ratio=hidden)
    vit.pos_embed.normal_()
    return vit.state_dict()


def test_shape_and_weights_come_from_the_tensors():
    tensors = state(depth=4, hidden=2.5)
    teacher = Teacher(tensors, heads=4, taps=(1, 3))
    got = teacher.vit.state_dict()
    assert got.keys() == tensors.keys() and all(torch.equal(got[n], tensors[n]) for n in got)
    assert len(teacher.vit.blocks) == 4 and teacher.vit.blocks[0].attn.heads == 4 and teacher.vit.patch_size == 8
    tensors["cls_token"].zero_()
    assert teacher.vit.cls_token.any(), "the teacher shares memory with what it was made of"


def test_it_stays_frozen():
    teacher = Teacher(state(), heads=2, taps=(0,))
    teacher.train()
    assert not teacher.training and not teacher.vit.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_gradients_flow_into_a_pseudo_image_and_not_into_weights(images):
    teacher = Teacher(state(), heads=2, taps=(0, 2))
    pseudo = normalise(images).requires_grad_()
    sum(f.square().sum() for f in teacher.features(pseudo)).backward()
    assert pseudo.grad.abs().amin(dim=(1, 2, 3)).shape == (5,) and (pseudo.grad != 0).float().mean() > 0.99
    assert all(p.grad is None for p in teacher.parameters())
    # The same pixels, as uint8 and as floats, have the same features.
    for a, b in zip(teacher.features(images), teacher.features(pseudo)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("axis, dim", [("tokens", 1), ("channels", 2)])
def test_feature_loss_is_the_taps_sum_and_so_is_its_gradient(images, axis, dim, kernels):
    teacher = Teacher(state(), heads=2, taps=(0, 1, 2), kernels=kernels)
    pseudo = (normalise(images) + 0.3 * torch.randn(images.permute(0, 3, 1, 2).shape)).requires_grad_()
    targets = [f.detach() for f in teacher.features(images)]
    loss = teacher.feature_loss(pseudo, targets, axis)
    loss.backward()
    ours, pseudo.grad = pseudo.grad, None
    pairs = zip(teacher.features(pseudo), targets)
    expected = sum((F.normalize(a, dim=dim) - F.normalize(b, dim=dim)).square().mean() for a, b in pairs)
    expected.backward()
    # The same float32 sums in another order, through three blocks.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, pseudo.grad, rtol=0, atol=1e-5 * float(ours.abs().max()))
    assert all(p.grad is None for p in teacher.parameters())


def test_what_a_tap_returns_goes_on(images):
    teacher = Teacher(state(depth=4), heads=2, taps=(1, 3))
    seen = []
    outputs = teacher.vit.features(images, teacher.taps, lambda index, tokens: seen.append(index) or tokens + index)
    plain = teacher.features(images)
    # The second output has seen the first one's change.
    assert seen == [1, 3] and torch.equal(outputs[0], plain[0] + 1) and not torch.allclose(outputs[1], plain[1] + 3)


def test_matrices_cast_once_give_the_bits_of_autocast(images):
    plain, cast = Teacher(state(), heads=2, taps=(2,)), Teacher(state(), heads=2, taps=(2,)).to_autocast(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (images, normalise(images)):
            assert torch.equal(plain.features(x)[0], cast.features(x)[0])


@pytest.mark.parametrize("size", [16, 24, 64])
def test_position_table_of_another_size(size):
    tensors = state()
    teacher = Teacher(tensors, heads=2, taps=(0,), image_size=size)
    grid = size // 8
    assert teacher.vit.pos_embed.shape == (1, 1 + grid**2, 16) and teacher.vit.image_size == size
    assert torch.equal(teacher.vit.pos_embed[:, 0], tensors["pos_embed"][:, 0])
    # A table that is linear in row and column stays linear inside, where no edge is involved.
    line = torch.linspace(-1, 1, 9)[1::2]  # centres of 4 cells of [-1, 1]
    tensors["pos_embed"][0, 1:] = (line[:, None] + 2 * line[None]).reshape(16, 1)
    table = Teacher(tensors, heads=2, taps=(0,), image_size=64).vit.pos_embed[0, 1:, 0].view(8, 8)
    centres = torch.linspace(-1, 1, 17)[1::2]
    inner = slice(3, 5)
    torch.testing.assert_close(
        table[inner, inner], (centres[:, None] + 2 * centres[None])[inner, inner], rtol=0, atol=1e-5
    )


def test_a_student_with_other_patches_shares_its_teacher(images):
    # 48-pixel images, patches of 16 here and of 8 there: only pixels are shared.
    big = F.interpolate(normalise(images), size=48)
    assert Teacher(state(patch=16), heads=2, taps=(0,), image_size=48).features(big)[0].shape == (5, 10, 16)


def test_what_does_not_fit_is_one_line():
    with pytest.raises(UserError, match=r"model.image_size=30.*patches of 8 pixels do not divide it; use 32"):
        Teacher(state(), heads=2, taps=(0,), image_size=30)
    with pytest.raises(UserError, match=r"teacher.taps=\[0, 3\]: the teacher has blocks 0 to 2"):
        Teacher(state(), heads=2, taps=(0, 3))
