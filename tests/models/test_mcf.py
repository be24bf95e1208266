"""The network and its objective: what depends on what, the terms and their weights, precision."""

import pytest
import torch
import torch.nn.functional as F

from mcf import kernels
from mcf.errors import UserError
from mcf.models import Objective, build_student, dropped
from mcf.models.mcf import pixel_loss, spread
from mcf.models.patches import normalise, patchify, unpatchify


def inputs(batch=5, keep=4):
    ids_keep, ids_restore = kernels.mask(0, torch.arange(batch), kernels.ENCODER, 16, keep)
    return ids_keep, ids_restore, dropped(ids_restore, keep)


def keys_for(batch=5, dim=8, count=11):
    keys = F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    return keys, torch.randperm(count, generator=torch.Generator().manual_seed(0))[:batch]


def test_initial_weights_are_a_function_of_the_seed(recipe, recipe_with):
    torch.manual_seed(99)
    first = build_student(recipe).state_dict()
    state = torch.random.get_rng_state()
    second = build_student(recipe).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers were used"
    assert all(torch.equal(first[n], second[n]) for n in first)
    other = build_student(recipe_with(seed=1)).state_dict()
    assert not torch.equal(first["encoder.cls_token"], other["encoder.cls_token"])


def test_decoder_and_query_use_the_encoders_normalised_tokens(recipe, images):
    student = build_student(recipe)
    ids_keep, ids_restore, _ = inputs()
    pred, q = student(images, ids_keep, ids_restore)
    tokens = student.encoder(images, ids_keep)
    decoder = student.decoder
    x = decoder.embed(tokens)
    rows = torch.stack([
        torch.stack([x[b, 1 + r] if r < 4 else decoder.mask_token[0, 0] for r in ids_restore[b].tolist()]) for b in range(5)
    ])  # fmt: skip
    x = torch.cat([x[:, :1], rows], 1) + decoder.pos_embed
    expected = decoder.pred(decoder.norm(decoder.blocks[0](x)))[:, 1:]
    # The same float32 operations in another layout.
    torch.testing.assert_close(pred, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(q, student.predictor(student.projector(tokens[:, 0])), rtol=0, atol=1e-4)
    assert pred.shape == (5, 16, 192) and q.shape == (5, 8)


def test_every_parameter_gets_a_gradient(recipe, teacher, images):
    student, (keys, labels) = build_student(recipe), keys_for()
    ids_keep, ids_restore, mask = inputs()
    pred, q = student(images, ids_keep, ids_restore)
    Objective(recipe, teacher)(images, pred, q, keys, labels, mask)["total"].backward()
    assert all(p.grad is not None and p.grad.any() for _, p in student.named_parameters())


def test_terms_and_their_weights(recipe_with, teacher, images):
    recipe = recipe_with(loss={"feature": 30.0, "contrast": 0.7, "pixel": 2.0}, contrast={"temperature": 0.3})
    (keys, labels), (_, _, mask) = keys_for(), inputs()
    g = torch.Generator().manual_seed(3)
    pred, q = torch.randn(5, 16, 192, generator=g), torch.randn(5, 8, generator=g)
    terms = Objective(recipe, teacher)(images, pred, q, keys, labels, mask)

    with torch.no_grad():
        pairs = zip(teacher.features(unpatchify(pred, 8)), teacher.features(normalise(images)))
        feature = sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().mean() for a, b in pairs)
        logits = F.normalize(q, dim=1) @ keys.T / 0.3
        contrast = (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean() * 0.6
        pixel = (pred - patchify(normalise(images), 8))[mask].square().mean()
    for name, expected in {"feature": feature, "contrast": contrast, "pixel": pixel}.items():
        # Float32 sums in another order, over up to 15,000 values.
        torch.testing.assert_close(terms[name], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(terms["total"], 30 * feature + 0.7 * contrast + 2 * pixel, rtol=1e-5, atol=0)
    cosines = F.normalize(q, dim=1) @ keys.T
    assert float(terms["accuracy"]) == pytest.approx(float((cosines.argmax(1) == labels).float().mean()))
    assert float(terms["positive"]) == pytest.approx(float(cosines[range(5), labels].mean()), abs=1e-6)
    others = torch.ones_like(cosines, dtype=torch.bool)
    others[range(5), labels] = False
    assert float(terms["negative"]) == pytest.approx(float(cosines[others].mean()), abs=1e-6)
    p = (cosines / 0.3).softmax(1)
    assert float(terms["entropy"]) == pytest.approx(float(-(p * p.log()).sum(1).mean()), abs=1e-5)
    assert float(terms["query_std"]) == pytest.approx(float(spread(F.normalize(q, dim=1))))
    assert float(terms["key_std"]) == pytest.approx(float(spread(keys)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_implementations_give_the_same_terms_and_gradients(recipe_with, teacher, images, precision):
    (keys, labels), (_, _, mask) = keys_for(), inputs()
    g = torch.Generator().manual_seed(3)
    start = torch.randn(5, 16, 192, generator=g), torch.randn(5, 8, generator=g)
    outcomes = {}
    for kernels_key in ("triton", "reference"):
        recipe = recipe_with(kernels=kernels_key, train={"precision": precision})
        teacher.kernels = kernels_key
        pred, q = (tensor.clone().requires_grad_() for tensor in start)
        terms = Objective(recipe, teacher)(images, pred, q, keys, labels, mask)
        terms["total"].backward()
        outcomes[kernels_key] = {n: t.detach() for n, t in terms.items()}, pred.grad, q.grad
    # Both compute in float32, whatever the teacher's blocks do between the taps: those round a gradient that differs in
    # its last bits to bfloat16 now and then the other way, which is 2⁻⁸ of one value.
    error = 1e-5 if precision == "fp32" else 2e-3
    (ours, *our_grads), (theirs, *their_grads) = outcomes.values()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(our_grads, their_grads):
        assert float((a - b).norm()) <= error * float(b.norm())


def test_feature_axis_and_taps_matter(recipe_with, teacher, images):
    pred = torch.randn(5, 16, 192, generator=torch.Generator().manual_seed(3))
    tokens = Objective(recipe_with(loss={"feature_axis": "tokens"}), teacher).feature(images, pred)
    channels = Objective(recipe_with(loss={"feature_axis": "channels"}), teacher).feature(images, pred)
    # Two taps; each term lies in [0, 4/tokens] or [0, 4/channels].
    assert 0 < tokens < 2 * 4 / 5 and 0 < channels < 2 * 4 / 16 and tokens != channels


def test_terms_that_are_off(recipe_with, teacher, images):
    (keys, labels), (_, _, mask) = keys_for(), inputs()
    pred, q = torch.randn(5, 16, 192, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    objective = Objective(recipe_with(loss={"feature": 0, "contrast": 0, "pixel": 1}), None)
    terms = objective(images, pred, q, keys, labels, mask)
    assert "feature" not in terms and torch.equal(terms["total"], terms["pixel"])
    terms["total"].backward()
    assert q.grad is not None and not q.grad.any(), "heads without gradients would not be reduced like the others"
    with pytest.raises(UserError, match=r"loss.feature=1000 needs a teacher.*loss.feature=0"):
        Objective(recipe_with(), None)


def test_pixel_loss_counts_dropped_patches_only_and_normalises(images):
    (_, _, mask) = inputs()
    target = patchify(normalise(images), 8)
    wrong_where_visible = torch.where(mask[:, :, None], target, target + 5)
    assert pixel_loss(images, wrong_where_visible, mask, 8) == 0
    ones = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert float(pixel_loss(images, ones, mask, 8, normalised=True)) == pytest.approx(0, abs=1e-10)
    assert float(pixel_loss(images, ones + 2, mask.float(), 8, normalised=True)) == pytest.approx(4, rel=1e-5)


def test_a_patch_without_contrast_is_normalised_with_epsilon_under_the_root():
    """As MAE has it: a flat patch is left flat, where ε beside the root would blow its rounding up to full contrast."""
    flat = torch.tensor([59, 53, 40], dtype=torch.uint8).expand(1, 8, 8, 3)  # near one value in normalised units
    values = (flat.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    square, variance = (values - values.mean()).square().mean(), values.var()
    assert variance < 1e-7
    loss = pixel_loss(flat, torch.zeros(1, 1, 192), torch.ones(1, 1), 8, normalised=True)
    # Values near −1.1 lie up to 6e-4 apart: roundings of float32, 1e-7 each, are 4e-4 of that, squared twice as much.
    # With ε beside the root it would be 0.99 instead of 0.05.
    assert float(loss) == pytest.approx(float(square / (variance + 1e-6)), rel=5e-3)


def test_groups_of_keys(recipe_with, images):
    recipe = recipe_with(loss={"feature": 0, "pixel": 1})
    (_, _, mask) = inputs(4)
    g = torch.Generator().manual_seed(0)
    pred, q = torch.randn(4, 16, 192, generator=g), torch.randn(4, 8, generator=g)
    keys, labels = F.normalize(torch.randn(2, 6, 8, generator=g), dim=2), torch.tensor([5, 0, 0, 3])
    objective = Objective(recipe, None)
    both = objective(images[:4], pred, q, keys, labels, mask)
    parts = [
        objective(images[s], pred[s], q[s], keys[i], labels[s], mask[s])
        for i, s in enumerate((slice(0, 2), slice(2, 4)))
    ]
    for name in ("contrast", "accuracy", "positive", "negative", "entropy"):
        torch.testing.assert_close(both[name], (parts[0][name] + parts[1][name]) / 2)


def test_spread_of_vectors():
    even = F.normalize(torch.randn(4000, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    # 4,000 vectors estimate each of 32 deviations to about 1 %, and their mean to a fifth of that.
    assert float(spread(even)) == pytest.approx(1, abs=0.01)
    assert float(spread(even[:1].expand(50, -1))) < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_autocast_keeps_losses_and_gradients_in_float32(recipe_with, teacher, images, precision):
    recipe = recipe_with(train={"precision": precision}, loss={"pixel": 1.0})
    student, (keys, labels) = build_student(recipe), keys_for()
    ids_keep, ids_restore, mask = inputs()
    objective = Objective(recipe, teacher)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        pred, q = student(images, ids_keep, ids_restore)
    # The objective does not depend on an autocast around it.
    outside = objective(images, pred, q, keys, labels, mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        inside = objective(images, pred, q, keys, labels, mask)
    assert all(torch.equal(outside[n], inside[n]) and outside[n].dtype == torch.float32 for n in outside)
    inside["total"].backward()
    assert all(p.grad.dtype == torch.float32 for p in student.parameters())


def test_bf16_is_close_to_float32(recipe_with, images):
    student, (ids_keep, ids_restore, _) = build_student(recipe_with()), inputs()
    exact, _ = student(images, ids_keep, ids_restore)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = student(images, ids_keep, ids_restore)
    # bfloat16 has 8 bits: a few roundings of 0.4 % through three blocks.
    assert float((rounded.float() - exact).detach().norm() / exact.detach().norm()) < 0.03
