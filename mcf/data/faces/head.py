"""The head as a surface: profiles lofted to a skull, features as relief, and the 68 landmarks on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from mcf.data.faces import chart
from mcf.data.faces.chart import Floats
from mcf.data.faces.features import JAW_POINTS, Features, ramp
from mcf.data.faces.parameters import FaceParameters, Identity

COARSE = 65  # cells of the chart on which the smooth skull is solved
DOME = 0.4  # y where the dome of the skull begins
CROWN = 1.13
ROWS = 1024


@dataclass(frozen=True)
class Head:
    """The bare head: tables over the chart, features and landmarks, in head coordinates."""

    features: Features
    base: Floats  # [cells, cells, 3] points of the smooth skull: where hair lines and beards are drawn
    radius: Floats  # [cells, cells] of the skin
    landmarks: NDArray[np.float64]  # [68, 3]; the jaw's as for a face seen from the front
    jaw_paths: NDArray[np.float64]  # [17, M, 3]: where a jaw point slides when the head turns


def rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """Matrix [3, 3] from head to camera coordinates; angles in degrees."""
    a, b, c = np.radians([yaw, -pitch, roll])
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return (about_z @ about_x @ about_y).astype(np.float32)


def _profiles(who: Identity, features: Features) -> tuple[NDArray[np.float64], Floats]:
    """Heights [ROWS] and, for each, half width, front z, back z and the z of the widest point [ROWS, 4]."""
    w, chin = who.width, who.chin
    jaw = w * (0.45 + 0.55 * who.jaw)
    low = features.chin
    s = (low + 0.30) / (-1.13 + 0.30)  # stretch of the face below the nose's bridge

    def below(y: float) -> float:
        return -0.30 + (y + 0.30) * s

    full = 0.35 * (1 - who.masculine)  # softer temples and cheeks
    heights = [low, below(-1.09), below(-1.0), below(-0.86), below(-0.7), below(-0.52), -0.3, -0.1, 0.15, DOME]
    width = np.array(
        [
            0.02,
            0.23 * (0.4 + 0.6 * chin),
            0.35 * (0.4 + 0.6 * chin),
            0.48 * (chin + 2 * jaw) / 3,
            0.565 * jaw,
            0.635 * jaw,
            0.685 * w + 0.006 * full,
            0.722 * w,
            0.742 * w,
            0.745 * w,
        ]
    )
    front = np.array([0.60, 0.7, 0.755, 0.75, 0.795, 0.80, 0.795, 0.785, 0.80, 0.79])
    back = np.array([0.42, 0.3, 0.18, 0.0, -0.25, -0.5, -0.68, -0.84, -0.95, -1.0])
    middle = np.array([0.52, 0.45, 0.36, 0.26, 0.16, 0.08, 0.02, -0.02, -0.06, -0.1])
    y = np.linspace(low - 0.02, CROWN, ROWS)
    spline = PchipInterpolator(heights, np.stack([width, front, back, middle], axis=1), axis=0)
    rows = spline(np.clip(y, low, DOME))
    dome = np.sqrt(np.clip(1 - (np.maximum(y - DOME, 0) / (CROWN - DOME)) ** 2.3, 1e-4, 1))
    over = y > DOME
    rows[over, 0] *= dome[over]
    for k in (1, 2):
        rows[over, k] = rows[over, 3] + (rows[over, k] - rows[over, 3]) * dome[over]
    rows[y < low, 0] = 0.005
    return y, rows.astype(np.float32)


def _skull(who: Identity, features: Features) -> Floats:
    """Radius [cells, cells] of the smooth skull, solved by bisection on a coarse chart."""
    heights, rows = _profiles(who, features)
    n = chart.directions(COARSE).reshape(-1, 3)
    inner, outer = np.full(len(n), 0.1, np.float32), np.full(len(n), 1.9, np.float32)
    low, span = float(heights[0]), (ROWS - 1) / float(heights[-1] - heights[0])
    for _ in range(13):
        r = (inner + outer) / 2
        p = r[:, None] * n
        at = (p[:, 1] - low) * span
        width, front, back, middle = rows[np.clip(at, 0, ROWS - 1).astype(np.int32)].T
        dz = p[:, 2] - middle
        depth = np.where(dz > 0, front - middle, middle - back)
        inside = (np.abs(p[:, 0]) / width) ** 2.3 + (np.abs(dz) / np.maximum(depth, 0.01)) ** 2.3 < 1
        inside &= (at > 0) & (at < ROWS - 1)
        inner, outer = np.where(inside, r, inner), np.where(inside, outer, r)
    smooth = ndimage.gaussian_filter(inner.reshape(COARSE, COARSE), 0.7, mode="nearest")
    return ndimage.zoom(smooth, chart.CELLS / COARSE, order=3, mode="nearest")


def _relief(who: Identity, f: Features, grin: float, base: Floats) -> Floats:
    """Height [cells, half the cells] of all features over the skull, on the half x ≥ 0 of the chart."""
    x, y, z = base[..., 0], base[..., 1], base[..., 2]

    def bump(cx: float, cy: float, sx: float, sy: float) -> Floats:
        return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    man, old = who.masculine, who.age
    base_y = f.nose_base + 0.055  # relief rises along the radius: what sticks out ends lower than it starts
    bridge = who.nose_bridge
    heights = [base_y - 0.075, base_y - 0.01, base_y + 0.07, base_y + 0.2, 0.02, 0.14, 0.24]
    profile = np.interp(y, heights, [0, 0.10, 0.175, 0.10 + 0.045 * bridge, 0.05 * bridge, 0.035, 0])
    ridge = np.interp(y, [base_y, base_y + 0.1, base_y + 0.24, 0.12], [0.135, 0.11, 0.085, 0.095]) * who.nose_width
    h = profile * np.exp(-((np.abs(x) / ridge) ** 2.0))
    h += 0.05 * who.nose_tip * bump(0, base_y + 0.06, 0.09 * who.nose_width, 0.06)
    wing = f.nose_half * 0.72
    h += 0.085 * bump(wing, base_y + 0.035, 0.055, 0.05)
    h -= 0.03 * bump(f.nose_half * 1.25, base_y + 0.06, 0.05, 0.06)
    h -= 0.085 * bump(f.eye_x - 0.03, 0.025, 0.17, 0.095) + 0.02 * bump(f.eye_x - f.eye_half, -0.03, 0.06, 0.07)
    h += 0.055 * bump(f.eye_x, 0.0, 0.115, 0.075)
    lid_fold = f.brow_y - 0.075
    h += (0.022 + 0.02 * who.hooded) * bump(f.eye_x + 0.04, lid_fold, 0.17, 0.035)
    h += (0.012 + 0.03 * man) * bump(f.eye_x - 0.04, f.brow_y - 0.015, 0.2, 0.05)
    h += 0.035 * who.cheek * bump(0.44, -0.2, 0.17, 0.12) + 0.035 * grin * bump(0.36, -0.26, 0.13, 0.1)
    h -= 0.02 * bump(0.5, -0.5, 0.14, 0.16) * (1 - 0.5 * grin)
    h -= (0.012 + 0.02 * old) * bump(f.eye_x - 0.05, -0.13, 0.12, 0.03)
    fold = 0.2 + 0.45 * (f.nose_base - y) + 0.03 * grin
    crease = np.exp(-(((x - fold) / 0.035) ** 2)) * ramp(y, f.mouth_y - 0.1, f.mouth_y + 0.05)
    h -= (0.006 + 0.016 * old + 0.02 * grin) * crease * (1 - ramp(y, f.nose_base, f.nose_base + 0.1))
    # The lips lie on a gentle mound (the teeth); both are shifted up by what the radius carries them down.
    up = 0.035
    my = f.mouth_y + up
    h += 0.03 * bump(0, my, 0.26, 0.15)
    h += 0.034 * bump(0, my + f.gap_upper + 0.03, f.mouth_half * 0.72, 0.035)
    h += 0.042 * bump(0, my - f.gap_lower - 0.045, f.mouth_half * 0.66, 0.04)
    h -= 0.022 * bump(0, my - f.gap_upper * 0.3, f.mouth_half * 0.9, 0.012)
    h -= 0.013 * bump(0, (f.nose_base + my + f.lip_upper) / 2, 0.03, 0.05)
    h -= 0.018 * bump(0, my - f.gap_lower - 0.135, 0.16, 0.045)
    h -= 0.015 * bump(f.mouth_half + 0.03, my, 0.04, 0.05)
    h += 0.03 * bump(0, f.chin + 0.16, 0.17 * who.chin, 0.11)
    h -= 0.015 * bump(0.66, 0.28, 0.1, 0.15)
    return (h * ramp(z, 0.05, 0.3)).astype(np.float32)


def build(parameters: FaceParameters) -> Head:
    """The bare head of a person with an expression."""
    who = parameters.identity
    f = Features.of(parameters)
    n = chart.directions()
    skull = _skull(who, f)
    base = skull[..., None] * n
    half = chart.CELLS // 2
    right = _relief(who, f, max(0.0, parameters.scene.smile), base[:, half:])
    relief = np.concatenate([right[:, :0:-1], right], axis=1)
    radius = np.ascontiguousarray(skull + relief)

    frontal = f.frontal_landmarks().astype(np.float32)
    still = np.eye(3, dtype=np.float32)
    start = np.full(len(frontal), 1.5, np.float32)
    depth, _ = chart.march(chart.Radii(radius), still, frontal[:, 0], frontal[:, 1], start, 24)
    features = np.column_stack([frontal, depth]).astype(np.float64)
    paths = _jaw_paths(radius, f)
    return Head(f, base, radius, np.concatenate([paths[:, 0], features]), paths)


def _jaw_paths(radius: Floats, f: Features) -> NDArray[np.float64]:
    """For each jaw landmark, points [17, M, 3] on the surface from its place seen from the front, inward."""
    turn = np.linspace(-1, 1, JAW_POINTS)
    height = np.interp(np.abs(turn), [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1], _JAW_SHARES)
    y = 0.02 + (f.chin - 0.02) * height
    # In a cut at height y the outline seen from the front is where |x| is largest.
    azimuth = np.radians(np.linspace(0, 105, 106))
    side = np.where(turn < 0, -1, 1)[:, None]
    ray_x, ray_z = np.sin(azimuth) * side, np.broadcast_to(np.cos(azimuth), (JAW_POINTS, len(azimuth)))
    rho = np.full(ray_x.shape, 0.5)
    level = np.broadcast_to(y[:, None], ray_x.shape)
    for _ in range(8):  # radius at fixed height: solve |(rho, y)| = radius(direction)
        p = np.stack([ray_x * rho, level, ray_z * rho]).astype(np.float32)
        column, row, r = chart.locate(*p)
        on = chart.bilinear(radius, column.ravel(), row.ravel()).reshape(r.shape)
        rho = np.clip(rho * on / r, 0.02, 1.5)
    widest = np.argmax(np.abs(ray_x * rho), axis=1)
    of = np.arange(JAW_POINTS)
    edge = np.stack([(ray_x * rho)[of, widest], y, (ray_z * rho)[of, widest]], axis=1)
    edge[JAW_POINTS // 2] = (0, f.chin + 0.012, 0.66)
    inner = np.array([0, (f.mouth_y + f.chin) / 2 * 0.5 - 0.1, 0.75])
    share = np.linspace(0, 0.75, 16)[:, None]
    paths = np.stack([edge[i] + share * (inner - edge[i]) for i in range(JAW_POINTS)])
    flat = paths.reshape(-1, 3).astype(np.float32)
    column, row, r = chart.locate(*flat.T)
    scaled = flat * (chart.bilinear(radius, column, row) / r)[:, None]
    return scaled.reshape(paths.shape).astype(np.float64)


# Heights of the jaw points between the ear (0) and the chin (1), from the chin outward.
_JAW_SHARES = (1.0, 0.965, 0.89, 0.785, 0.655, 0.50, 0.335, 0.165, 0.0)


def project_landmarks(head: Head, turn: Floats) -> NDArray[np.float64]:
    """The 68 landmarks [68, 3] in camera coordinates.

    The jaw's points follow the convention of hand-made 68-point labels: on the far side of a turned head they slide
    along the cheek to the visible outline.
    """
    points = head.landmarks @ turn.T.astype(np.float64)
    paths = head.jaw_paths @ turn.T.astype(np.float64)
    up = turn[:2, 1] / np.linalg.norm(turn[:2, 1])
    right = np.array([up[1], -up[0]])
    angle = np.radians(np.linspace(-80, 80, JAW_POINTS))
    for i in range(JAW_POINTS):
        outward = np.sin(angle[i]) * right - np.cos(angle[i]) * 0.5 * up
        points[i] = paths[i, np.argmax(paths[i, :, :2] @ outward)]
    return points
