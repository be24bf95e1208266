"""What features tell: nearest neighbours, a linear probe, ridge regression, effective rank and uniformity.

Plain functions of features [N, D], in float64 on whichever device these are. Nothing is drawn at random: equal features
give equal numbers, and no generator moves.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of the votes of neighbours (Wu et al. 2018; Caron et al. 2021)
CHUNK = 1024  # queries whose similarities to all faces exist at a time
STRENGTHS = tuple(10.0**power for power in range(-5, 2))  # of the ridge, times the mean square of a face's features
HELD_OUT = 5  # one of so many groups of the training part chooses among them


def knn(features: Tensor, labels: Tensor, groups: Tensor, neighbours: int) -> tuple[float, int]:
    """Share of the faces whose label their nearest neighbours in *other* groups tell, and how many faces were asked.

    Every face is a query once, and its neighbours (by cosine) are all faces of other groups, so that no frame is
    recognised by another of its video. A face whose label no other group has is nobody's to find, and not asked; it stays
    among those that may be found. Each of the `neighbours` votes for its label with weight exp(cosine / 0.07).

    Args:
        features: [N, D].
        labels, groups: int64 [N], numbers from 0.

    Returns:
        (share, queries); (nan, 0) where no face can be asked.
    """
    x = F.normalize(features.double(), dim=1)
    count = int(labels.max()) + 1
    right = asked = 0
    for first in range(0, len(x), CHUNK):
        mine = slice(first, first + CHUNK)
        other = groups[mine, None] != groups
        findable = ((labels[mine, None] == labels) & other).any(1)
        similarity = (x[mine] @ x.T).masked_fill(~other, -math.inf)
        nearest, where = similarity.topk(min(neighbours, len(x)), dim=1)
        # Relative to the nearest, so that nothing overflows; faces of the own group weigh exp(−∞) = 0.
        weights = ((nearest - nearest[:, :1]) / TEMPERATURE).exp()
        votes = torch.zeros(len(nearest), count, dtype=x.dtype, device=x.device)
        votes.scatter_add_(1, labels[where], weights)
        right += int(((votes.argmax(1) == labels[mine]) & findable).sum())
        asked += int(findable.sum())
    return (right / asked if asked else math.nan), asked


def linear_probe(features: Tensor, labels: Tensor, train: Tensor, strength: float = 1.0) -> float:
    """Accuracy of multinomial logistic regression on the faces that it was not fitted to.

    Features are brought to mean 0 and variance 1 by the training part. What is minimised is
    Σ cross-entropy + ‖W‖² / (2 · strength): scikit-learn's objective with C = strength, the biases free.

    Args:
        features: [N, D].
        labels: int64 [N]; negative ones are left out.
        train: bool [N], the faces to fit; the others are the test.

    Returns:
        Share of the test faces that are told; nan where a part is empty.
    """
    fit, test = train & (labels >= 0), ~train & (labels >= 0)
    if not fit.any() or not test.any():
        return math.nan
    classes, numbers = labels[fit].unique(return_inverse=True)
    x = standardised(features, fit)
    weight, bias = logistic(x[fit], numbers, len(classes), strength)
    return float((classes[(x[test] @ weight.T + bias).argmax(1)] == labels[test]).double().mean())


def standardised(features: Tensor, by: Tensor) -> Tensor:
    """Features [N, D] at mean 0 and variance 1 in the rows `by` (bool [N]), float64; constant ones become 0."""
    x = features.double()
    x = x - x[by].mean(0)
    scale = x[by].std(0, correction=0)
    return x / torch.where(scale > 1e-6 * scale.max(), scale, torch.inf)


def logistic(x: Tensor, labels: Tensor, classes: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight [classes, D] and bias [classes] of multinomial logistic regression on x [N, D], float64 (`linear_probe`)."""
    with torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            fit = F.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
            # Per face: the optimiser's tolerances then mean the same for any number of them.
            value = (fit + weight.square().sum() / (2 * strength)) / len(x)
            value.backward()
            return value

        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def ridge(features: Tensor, targets: Tensor, groups: Tensor, train: Tensor) -> Tensor:
    """Targets of the test rows, predicted by ridge regression from features; its strength is chosen inside the training part.

    Both are centred by the rows that are fitted. The strengths tried are 10⁻⁵ … 10 times the mean squared length of the
    centred features; the one with the least squared error on a fifth of the training *groups*, held out, is used on all.

    Args:
        features: [N, D], any D: what is solved is as large as the number of training rows.
        targets: [N, T].
        groups: int64 [N]; no group is fitted and held out at once.
        train: bool [N], the rows to fit.

    Returns:
        float64 [number of rows not in `train`, T].
    """
    # Inner products are all that is needed of features (the dual form). Centred roughly first, they keep their digits.
    x = features - features[train].mean(0)
    gram, y = (x @ x.T).double(), targets.double()
    known = groups[train].unique()
    held = train & torch.isin(groups, known[HELD_OUT - 1 :: HELD_OUT])
    inner = train & ~held
    strength = STRENGTHS[-1]
    if held.any() and inner.any():
        errors = [float((solve(gram, y, inner, held, s) - y[held]).square().sum()) for s in STRENGTHS]
        strength = STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]
    return solve(gram, y, train, ~train, strength)


def solve(gram: Tensor, targets: Tensor, fit: Tensor, ask: Tensor, strength: float) -> Tensor:
    """Predictions [asked, T] of the ridge regression on the rows `fit` for the rows `ask` (bool [N]).

    gram: inner products [N, N] of the features, which the rows `fit` centre. strength: see `ridge`.
    """
    inside = gram[fit][:, fit]
    column = inside.mean(1, keepdim=True)
    whole = inside.mean()
    centred = inside - column - column.T + whole
    n, scale = len(inside), centred.diagonal().mean()
    mean = targets[fit].mean(0)
    if not scale > 0:  # all features are one
        return mean.expand(int(ask.sum()), -1).clone()
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    dual = torch.linalg.solve(centred + strength * scale * eye, targets[fit] - mean)
    outside = gram[ask][:, fit]
    return (outside - outside.mean(1, keepdim=True) - column.T + whole) @ dual + mean


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of features [N, D], scaled to sum 1: RankMe (Garrido et al. 2023, eq. 1).

    Between 1, where all are one up to length (collapse), and min(N, D). Not centred, so that rounding around one common
    vector does not look like directions.
    """
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def uniformity(features: Tensor) -> float:
    """log of the mean over pairs of exp(−2‖x − y‖²) of features [N, D] of length 1 (Wang & Isola 2020).

    0 where all are one (collapse), near −4 where they are spread evenly over a sphere of many dimensions.
    """
    x = F.normalize(features.double(), dim=1)
    n, total = len(x), 0.0
    for first in range(0, n, CHUNK):
        rows = x[first : first + CHUNK]
        total += float((4 * (rows @ x.T).clamp(max=1) - 4).exp().sum())
    # A vector and itself give 1, and are no pair.
    return math.log((total - n) / (n * (n - 1)))
