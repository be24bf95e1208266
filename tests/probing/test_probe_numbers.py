"""The probes' numbers against scikit-learn, closed forms and cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mcf.probing import numbers


@pytest.fixture
def faces():
    """Features around a centre for each of 8 people with 5 videos of 3 frames; frames of a video are nearly one."""
    rng = np.random.default_rng(3)
    people = np.repeat(np.arange(8), 15)
    videos = np.repeat(np.arange(40), 3)
    centre, video = rng.normal(size=(8, 12)), rng.normal(size=(40, 12))
    features = centre[people] + 1.2 * video[videos] + 0.05 * rng.normal(size=(120, 12))
    return torch.from_numpy(features).float(), torch.from_numpy(people), torch.from_numpy(videos)


# --- nearest neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 3, 10])
def test_neighbours_are_those_of_scikit_learn_among_the_other_videos(faces, neighbours, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(numbers, "CHUNK", 50)  # two whole chunks and a part
    x, people, videos = faces
    right = 0
    for query in range(len(x)):
        others = videos != videos[query]
        judge = KNeighborsClassifier(neighbours, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
        judge.fit(x[others].double().numpy(), people[others].numpy())
        right += int(judge.predict(x[query : query + 1].double().numpy())[0] == int(people[query]))
    share, asked = numbers.knn(x, people, videos, neighbours)
    assert asked == 120
    assert 0.2 < share < 0.99, "a case that anything would pass"
    assert share == pytest.approx(right / 120, abs=1e-12)


def test_frames_of_a_video_do_not_find_each_other(faces):
    x, people, videos = faces
    alone = torch.arange(len(x))
    assert numbers.knn(x, people, alone, 1)[0] == 1.0  # the trivial answer: the next frame
    assert numbers.knn(x, people, videos, 1)[0] < 0.9


def test_who_cannot_be_found_is_not_asked_but_is_in_the_way():
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.96, 0.28]])
    labels, groups = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    # The third face, of a label of its own, is the nearest to both others.
    assert numbers.knn(x, labels, groups, 1) == (0.0, 2)
    assert numbers.knn(x[:2], labels[:2], groups[:2], 1) == (1.0, 2)
    share, asked = numbers.knn(x, torch.arange(3), groups, 1)
    assert math.isnan(share) and asked == 0
    # More neighbours than there are others: those of the own group have no vote.
    assert numbers.knn(x[:2], labels[:2], torch.tensor([0, 0]), 5)[1] == 0
    assert numbers.knn(torch.ones(3, 2), torch.tensor([0, 0, 0]), groups, 9) == (1.0, 3)


# --- linear probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_logistic_regression_is_that_of_scikit_learn(faces, strength):
    from sklearn.linear_model import LogisticRegression

    x, people, _ = faces
    x = numbers.standardised(x, torch.ones(len(x), dtype=torch.bool))
    weight, bias = numbers.logistic(x, people, 8, strength)
    judge = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x.numpy(), people.numpy())
    # Two optimisers stop at gradients of 1e-6 a face; the objective's curvature makes some 1e-5 of that.
    ours = torch.softmax(x @ weight.T + bias, 1).numpy()
    np.testing.assert_allclose(ours, judge.predict_proba(x.numpy()), atol=2e-4)


def test_the_linear_probe_judges_what_it_was_not_fitted_to(faces):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, people, videos = faces
    train = videos % 5 < 3
    labels = people.clone()
    labels[people == 7] = -1  # left out on both sides
    known = labels >= 0
    scaler = StandardScaler().fit(x[train & known].double().numpy())
    fit, test = (scaler.transform(x[m].double().numpy()) for m in (train & known, ~train & known))
    judge = LogisticRegression(tol=1e-8, max_iter=5000).fit(fit, people[train & known].numpy())
    expected = judge.score(test, people[~train & known].numpy())
    assert 0.3 < expected < 1
    assert numbers.linear_probe(x, labels, train) == pytest.approx(expected, abs=1e-12)


def test_constant_features_are_left_out_and_tell_nothing():
    x = torch.full((8, 3), 0.3)
    assert torch.equal(numbers.standardised(x, torch.ones(8, dtype=torch.bool)), torch.zeros(8, 3).double())
    labels, train = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1]), torch.arange(8) < 4
    assert numbers.linear_probe(x, labels, train) == 0.5  # the commoner label
    assert math.isnan(numbers.linear_probe(x, labels, torch.ones(8, dtype=torch.bool)))


# --- ridge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 200])
def test_ridge_is_the_closed_form_at_the_strength_that_held_out_people_choose(width, monkeypatch):
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(5)
    people = np.repeat(np.arange(25), 4)
    x = rng.normal(size=(100, width)) + 3.0
    y = x[:, :5] @ rng.normal(size=(5, 4)) + rng.normal(size=(100, 4)) + 7.0
    train = people < 20
    held = train & (people % 5 == 4)
    inner = train & ~held

    def fitted(rows, strength):
        centred = x[rows] - x[rows].mean(0)
        alpha = strength * (centred**2).sum(1).mean()
        return Ridge(alpha=alpha, solver="svd").fit(x[rows], y[rows])

    errors = [((fitted(inner, s).predict(x[held]) - y[held]) ** 2).sum() for s in numbers.STRENGTHS]
    best = numbers.STRENGTHS[int(np.argmin(errors))]
    assert best not in (numbers.STRENGTHS[0], numbers.STRENGTHS[-1]) or width == 6
    expected = fitted(train, best).predict(x[~train])
    tensors = [torch.from_numpy(array) for array in (x, y, people, train)]
    np.testing.assert_allclose(numbers.ridge(*tensors), expected, rtol=1e-6)
    # From float32 features: rounding of 6e-8, through a system whose condition is some 1e3.
    np.testing.assert_allclose(numbers.ridge(tensors[0].float(), *tensors[1:]), expected, rtol=1e-3, atol=1e-3)


def test_ridge_from_features_that_say_nothing_is_the_mean():
    y = torch.arange(12.0).view(6, 2)
    train = torch.arange(6) < 4
    found = numbers.ridge(torch.full((6, 3), 2.0), y, torch.arange(6), train)
    assert torch.equal(found, y[:4].mean(0).double().expand(2, 2))


# --- rank and uniformity --------------------------------------------------------------------------------------------


def test_rank_by_hand():
    assert numbers.effective_rank(torch.eye(7)) == pytest.approx(7)
    assert numbers.effective_rank(torch.ones(50, 9)) == pytest.approx(1, abs=1e-6)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert numbers.effective_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(math.exp(entropy))
    assert numbers.effective_rank(torch.zeros(4, 3)) == 1.0
    # Rounding around one vector is no direction: 1e-7 in each of 64.
    noise = 1e-7 * torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    assert numbers.effective_rank(torch.ones(100, 64) + noise) < 1.001


def test_uniformity_by_hand(monkeypatch):
    assert numbers.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert numbers.uniformity(torch.tensor([[2.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)  # ‖x − y‖² = 4
    assert numbers.uniformity(5 * torch.eye(6)) == pytest.approx(-4)  # ‖x − y‖² = 2
    monkeypatch.setattr(numbers, "CHUNK", 3)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    unit = (x / x.norm(dim=1, keepdim=True)).double()
    pairs = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert numbers.uniformity(x) == pytest.approx(float(pairs), rel=1e-6)
