"""NME, AUC, FR and F1 against hand-computed cases, scipy, scikit-learn and FaRL's published rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate
from sklearn.metrics import confusion_matrix, f1_score

from mcf.downstream.metrics import BOX, DIAGONAL, EYES, Confusion, Unit, auc_fr, ced, mean_f1, nme


def test_nme_by_hand():
    true = np.array([[[0.0, 0.0], [10.0, 0.0]], [[0.0, 0.0], [0.0, 8.0]]])
    predicted = true + np.array([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [6.0, 8.0]]])
    # distances 5 and 1, mean 3, over 10; distances 0 and 10, mean 5, over 4.
    assert nme(predicted, true, np.array([10.0, 4.0])) == pytest.approx([0.3, 1.25])


def test_units_by_hand():
    box = np.array([[10.0, 20.0, 13.0, 24.0]])
    points = np.zeros((1, 68, 2))
    assert DIAGONAL.of(points, box) == pytest.approx([5.0])
    assert BOX.of(points, box) == pytest.approx([12**0.5])
    points[0, 36], points[0, 45] = (1.0, 2.0), (4.0, 6.0)
    points[0, 37:42] = (1.0, 2.0)
    points[0, 42:48] = (4.0, 6.0)
    ocular, pupil = EYES[68]
    assert ocular.of(points, box) == pytest.approx([5.0])
    assert pupil.of(points, box) == pytest.approx([5.0])
    points[0, 38] = (7.0, 2.0)  # moves the centre of the left eye by one sixth of 6
    assert pupil.of(points, box) == pytest.approx([np.hypot(2.0, 4.0)])
    assert Unit("x", (0,), (36,)).of(points, box) == pytest.approx([5**0.5])


def test_a_square_box_gives_root_two_between_its_units():
    """DOWNSTREAM 3: AFLW's boxes are square, so NME_box = √2·NME_diag."""
    box, points = np.array([[5.0, 5.0, 105.0, 105.0]]), np.zeros((1, 19, 2))
    predicted = points + 1.0
    assert nme(predicted, points, BOX.of(points, box)) == pytest.approx(
        2**0.5 * nme(predicted, points, DIAGONAL.of(points, box))
    )


@pytest.mark.parametrize(("threshold", "points", "end"), [(0.10, 1001, 0.1000), (0.07, 702, 0.0701)])
def test_the_error_axis_has_the_published_number_of_points(threshold, points, end):
    x, share = ced(np.array([0.05]), threshold)
    assert len(x) == len(share) == points
    assert x[-1] == pytest.approx(end, abs=1e-9)


def test_auc_and_fr_by_hand():
    # All errors 0: the curve is 1 everywhere, its area is that of the axis.
    assert auc_fr(np.zeros(5), 0.10) == (pytest.approx(1.0), 0.0)
    assert auc_fr(np.zeros(5), 0.07)[0] == pytest.approx(0.0701 / 0.07)  # the 702nd point
    assert auc_fr(np.ones(5), 0.10) == (0.0, 1.0)
    # Half of the errors at 0.05: a step up to ½ there; Simpson's rule on steps of 1e-4 is right to one step.
    area, failures = auc_fr(np.array([0.05, 0.2]), 0.10)
    assert area == pytest.approx(0.25, abs=1e-3)
    assert failures == 0.5
    # An error of exactly the threshold is no failure on WFLW; on AFLW the axis ends a step later.
    assert auc_fr(np.array([0.0701 - 1e-9]), 0.07)[1] == 0.0
    assert auc_fr(np.array([0.0702]), 0.07)[1] == 1.0


@pytest.mark.parametrize("threshold", [0.10, 0.07, 0.08])
def test_auc_against_a_count_and_scipy(threshold):
    errors = np.random.default_rng(0).gamma(2.0, 0.02, 700)
    x = np.arange(0.0, threshold + 1e-4, 1e-4)
    share = np.array([sum(e <= value for e in errors) / len(errors) for value in x])
    ours, failures = auc_fr(errors, threshold)
    assert failures == pytest.approx(1 - share[-1], abs=1e-15)
    if len(x) % 2:
        assert ours == pytest.approx(integrate.simpson(share, x=x) / threshold, rel=1e-12)
    # scipy treats the left-over interval otherwise today; that and the trapezoid rule agree to what one interval holds.
    assert ours == pytest.approx(integrate.simpson(share, x=x) / threshold, abs=1e-5)
    assert ours == pytest.approx(integrate.trapezoid(share, x=x) / threshold, abs=2e-4)


def test_the_left_over_interval_is_averaged_over_both_ends():
    """By hand: y = x² on 0, 1, 2, 3. Simpson is exact on two intervals, a trapezoid adds 1/6 on one."""
    from mcf.downstream.metrics import _simpson

    x = np.arange(4.0)
    assert _simpson(x**2, x) == pytest.approx(9 + 1 / 6)


def test_f1_by_hand():
    confusion = Confusion(3)
    confusion.add(np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 1]]))
    # class 0: TP 1, row 2, column 1 → 2/3. class 1: TP 2, row 2, column 3 → 4/5. class 2: nowhere.
    f1 = confusion.f1()
    assert f1[:2] == pytest.approx([2 / 3, 4 / 5])
    assert np.isnan(f1[2])
    assert mean_f1(f1) == pytest.approx(4 / 5)
    assert mean_f1(f1, background=None) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert np.isnan(mean_f1([0.5, np.nan]))


def test_one_matrix_over_all_images_is_scikit_learns_and_no_mean_of_images():
    rng = np.random.default_rng(1)
    shapes = [(7, 9), (30, 20), (4, 4)]
    true = [rng.integers(0, 5, shape) for shape in shapes]
    predicted = [np.where(rng.random(t.shape) < 0.6, t, rng.integers(0, 5, t.shape)) for t in true]
    confusion = Confusion(5)
    for t, p in zip(true, predicted):
        confusion.add(t.astype(np.uint8), p)
    flat_true, flat_predicted = (np.concatenate([a.ravel() for a in arrays]) for arrays in (true, predicted))
    assert np.array_equal(confusion.counts, confusion_matrix(flat_true, flat_predicted, labels=range(5)))
    assert confusion.f1() == pytest.approx(f1_score(flat_true, flat_predicted, average=None), rel=1e-12)
    of_images = np.mean([f1_score(t.ravel(), p.ravel(), average=None) for t, p in zip(true, predicted)], axis=0)
    assert abs(mean_f1(of_images) - mean_f1(confusion.f1())) > 1e-3


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        Confusion(2).add(np.zeros((2, 3), int), np.zeros((3, 2), int))


# Rows of FaRL's released logs (github.com/FacePerceiver/FaRL, logs/paper): per-class F1 on the test set and the fg_mean
# beside them. LaPa: face_parsing.train_lapa_farl-b-ep16_448_refinebb, epoch 150, whose best is the published 93.88.
# CelebAMask-HQ: face_parsing.train_celebm_farl-b-ep16-448_refinebb, epoch 25, the published 89.56.
LAPA = [0.99245925, 0.980002013, 0.926970678, 0.926510028, 0.93973116, 0.93912486, 0.979178354, 0.901491884, 0.917424673,
        0.912140722, 0.965240662]  # fmt: skip
CELEBAMASK = [0.9689744606086474, 0.9244955815980238, 0.9674056022834371, 0.9130711609386735, 0.8946430047241984,
              0.8905693260739815, 0.8713583120968237, 0.8703441428874029, 0.9055687685461561, 0.9070875523014853,
              0.942186486721062, 0.9280268018419289, 0.9138205459215023, 0.9017446430251748, 0.9619674561229297,
              0.9536657732709962, 0.9208544673911239, 0.757175743508662, 0.6971499712639694]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "fg_mean", "published"), [(LAPA, 0.938781504, 93.88), (CELEBAMASK, 0.8956186300287519, 89.56)]
)
def test_published_rows_average_to_the_published_means(row, fg_mean, published):
    assert mean_f1(row) == pytest.approx(fg_mean, abs=1e-9)
    assert round(100 * mean_f1(row), 2) == published
