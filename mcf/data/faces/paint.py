"""The skin's colours and what is drawn on it: eyes, brows, nose, lips, beard; with the class of every point.

Everything is a function of the point's head coordinates (x, y seen from the front), with edges softened over one
pixel, so that paint, mask and landmarks come from the same curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from mcf.data.faces import noise
from mcf.data.faces.chart import Floats
from mcf.data.faces.features import Features, ramp
from mcf.data.faces.light import SKIN_WRAP, Light, linear, shade
from mcf.data.faces.parameters import FaceParameters, Identity

SKIN_TONES = ((246, 218, 200), (238, 198, 171), (220, 168, 132), (184, 128, 92), (132, 86, 60), (88, 56, 40))
LIPSTICK = (0.62, 0.13, 0.19)


class Label(IntEnum):
    """The 19 classes of CelebAMask-HQ; left and right are the person's."""

    BACKGROUND = 0
    SKIN = 1
    NOSE = 2
    GLASSES = 3
    LEFT_EYE = 4
    RIGHT_EYE = 5
    LEFT_BROW = 6
    RIGHT_BROW = 7
    LEFT_EAR = 8
    RIGHT_EAR = 9
    MOUTH = 10
    UPPER_LIP = 11
    LOWER_LIP = 12
    HAIR = 13
    HAT = 14
    EARRING = 15
    NECKLACE = 16
    NECK = 17
    CLOTH = 18


@dataclass(frozen=True)
class Points:
    """Visible points of the head: head coordinates [N], unit normals [N, 3], light and sky that arrive [N]."""

    x: Floats
    y: Floats
    z: Floats
    normal: Floats
    lit: Floats
    sky: Floats
    pixel: float  # of the picture that is drawn, in head units


def mix(colour: Floats, other: Floats, share: Floats) -> None:
    """Blend `other` into `colour` [N, 3], in place."""
    colour += (other - colour) * share[:, None]


def skin_tone(who: Identity) -> Floats:
    """Linear colour of the person's skin."""
    tones = linear(np.array(SKIN_TONES) / 255)
    at = who.melanin * (len(SKIN_TONES) - 1)
    tone = np.array([np.interp(at, np.arange(len(SKIN_TONES)), tones[:, c]) for c in range(3)])
    return (tone * (1, 1 - 0.1 * who.redness, 1 - 0.06 * who.redness)).astype(np.float32)


def paint(parameters: FaceParameters, f: Features, p: Points, light: Light) -> tuple[Floats, NDArray[np.uint8]]:
    """Linear colours [N, 3] and classes [N] of bare skin and features, without hair on the head."""
    who = parameters.identity
    label = np.full(len(p.x), Label.SKIN, np.uint8)
    albedo, gloss = _skin(who, f, p)
    front = p.z > 0.15
    label[front & (np.abs(p.x) < f.nose_width(p.y))] = Label.NOSE
    _nostrils(f, p, albedo)
    _beard(who, f, p, albedo, gloss)
    for side, which in ((1, Label.LEFT_BROW), (-1, Label.RIGHT_BROW)):
        _brow(who, f, p, albedo, label, side, which)
    _lips(who, f, p, albedo, gloss, label)
    for side in (1, -1):
        _lashes(who, f, p, albedo, side)
    colour = shade(albedo, p.normal, p.lit, p.sky, gloss, light, SKIN_WRAP)
    for side, which in ((1, Label.LEFT_EYE), (-1, Label.RIGHT_EYE)):
        _eye(parameters, f, p, colour, label, light, side, which)
    return colour, label


def _skin(who: Identity, f: Features, p: Points) -> tuple[Floats, Floats]:
    x, y = np.abs(p.x), p.y
    shift = who.texture % 251
    broad = noise.at(noise.table(6, 6), p.x * 60 + shift, p.y * 60 + p.z * 30)
    pores = noise.at(noise.table(0.8, 0.8), p.x * 150 + shift, p.y * 150 + p.z * 70)
    flush = 0.9 * np.exp(-(((x - 0.42) / 0.2) ** 2) - ((y + 0.27) / 0.17) ** 2)
    flush += 0.8 * np.exp(-((x / 0.13) ** 2) - ((y - f.nose_tip) / 0.1) ** 2)
    flush += 0.4 * np.exp(-((x / 0.2) ** 2) - ((y - f.chin - 0.12) / 0.1) ** 2)
    flush = flush * (0.25 + 0.55 * who.redness + 0.3 * who.makeup) * (1 - 0.55 * who.melanin)
    tired = np.exp(-(((x - f.eye_x + 0.03) / 0.14) ** 2) - ((y + 0.085) / 0.05) ** 2) * (0.25 + 0.5 * who.age)
    socket = np.exp(-(((x - f.eye_x) / 0.17) ** 2) - ((y - 0.07) / 0.06) ** 2) * 0.3
    albedo = np.tile(skin_tone(who), (len(x), 1))
    albedo *= (1 + 0.035 * broad + 0.03 * pores)[:, None]
    albedo *= 1 - flush[:, None] * np.array([0.02, 0.26, 0.22], np.float32)
    albedo *= 1 - (tired * 0.35 + socket * 0.4)[:, None] * np.array([0.55, 0.8, 0.7], np.float32)
    if who.freckles > 0.05:
        spots = ramp(noise.at(noise.table(1.6, 1.6), p.x * 110, p.y * 110 + shift), 1.1, 1.9)
        where = np.exp(-((x / 0.5) ** 2) - ((y + 0.15) / 0.22) ** 2)
        albedo *= 1 - (spots * where * min(1.0, 0.7 * who.freckles))[:, None] * np.array([0.3, 0.5, 0.6], np.float32)
    if who.age > 0.35:
        strength = (who.age - 0.35) * 0.32
        lines = np.exp(-((((y - 0.42 - 0.03 * np.cos(5 * x)) % 0.105 - 0.05) / 0.009) ** 2)) * ramp(x, 0.45, 0.2)
        lines *= ramp(y, 0.3, 0.36) * ramp(y, 0.68, 0.6)
        feet = np.abs(np.sin((y - 0.01) * 70 + (x - 0.5) * 20)) ** 12
        lines += feet * np.exp(-(((x - f.eye_x - f.eye_half - 0.07) / 0.05) ** 2) - (y / 0.06) ** 2) * 0.8
        fold = 0.2 + 0.45 * (f.nose_base - y)
        lines += np.exp(-(((x - fold) / 0.012) ** 2)) * ramp(y, f.mouth_y - 0.08, f.mouth_y) * (y < f.nose_base + 0.03)
        albedo *= 1 - (strength * lines)[:, None]
    oily = 0.65 + 0.5 * np.exp(-((x / 0.25) ** 2)) * (y > f.nose_tip - 0.1) + 0.12 * pores
    return albedo.astype(np.float32), oily.astype(np.float32) * np.float32(0.75)


def _nostrils(f: Features, p: Points, albedo: Floats) -> None:
    x = np.abs(p.x)
    r = ((x - 0.47 * f.nose_half) / (0.27 * f.nose_half)) ** 2 + ((p.y - f.nose_base - 0.006) / 0.017) ** 2
    albedo *= (1 - 0.8 * ramp(r, 1.5, 0.4) * (p.z > 0.3))[:, None]
    wing = ((x - 0.86 * f.nose_half) / 0.03) ** 2 + ((p.y - f.nose_base - 0.035) / 0.06) ** 2
    albedo *= (1 - 0.14 * np.exp(-wing))[:, None]


def _beard(who: Identity, f: Features, p: Points, albedo: Floats, gloss: Floats) -> None:
    if who.beard == "none" and who.masculine < 0.5:
        return
    x, y = np.abs(p.x), p.y
    upper_out, _, _, lower_out = f.lips(x / f.mouth_half)
    line = np.interp(x, [0.0, 0.22, 0.34, 0.52, 0.66, 0.75], [-0.5, -0.52, -0.6, -0.45, -0.2, 0.0])
    fuzz = noise.at(noise.table(0.7, 1.6), p.x * 120 + who.texture % 83, y * 120 + p.z * 60)
    y_fuzzy = y + 0.018 * fuzz
    full = ramp(line - y_fuzzy, -0.03, 0.06) * (p.z > -0.2)
    lip_y = upper_out
    moustache = ramp(f.nose_base - 0.02 - y_fuzzy, 0, 0.03) * ramp(y_fuzzy, lip_y - 0.02, lip_y + 0.015)
    moustache = moustache * ramp(x, f.mouth_half * 1.12, f.mouth_half * 0.9)
    below = ramp(lower_out - y_fuzzy, 0.03, 0.08)
    goatee = ramp(x + 0.03 * fuzz, 0.3, 0.12) * below
    wide = x + 0.02 * fuzz
    around = ramp(wide, f.mouth_half * 1.3, f.mouth_half * 1.08) * ramp(wide, f.mouth_half * 0.88, f.mouth_half * 1.06)
    around = around * ramp(y, f.mouth_y + 0.1, f.mouth_y + 0.05) * ramp(y, f.chin, f.chin + 0.1)
    lips = (x < f.mouth_half) & (y < upper_out) & (y > lower_out)
    strength, shape = {
        "none": (0.1 * who.masculine, np.maximum(full, moustache)),
        "stubble": (0.42, np.maximum(full, moustache)),
        "moustache": (0.9, moustache),
        "goatee": (0.88, np.maximum(np.maximum(moustache, goatee), around)),
        "full": (0.93, np.maximum(full, moustache)),
    }[who.beard]
    shape = np.where(lips, 0, shape) * strength * np.clip(0.85 + 0.22 * fuzz, 0, 1)
    tint = linear(who.hair_colour) * np.clip(0.85 + 0.3 * fuzz, 0.3, 2)[:, None]
    mix(albedo, tint.astype(np.float32), shape.astype(np.float32))
    gloss *= 1 - 0.8 * shape


def _brow(
    who: Identity, f: Features, p: Points, albedo: Floats, label: NDArray[np.uint8], side: int, which: int
) -> None:
    half = (f.brow_outer - f.brow_inner) / 2
    a = (side * p.x - f.brow_inner - half) / half
    middle, thick = f.brow(a)
    inside = thick - np.abs(p.y - middle)
    near = (np.abs(a) < 1.08) & (inside > -0.04) & (p.z > 0)
    if not near.any():
        return
    x, y, a, inside = p.x[near], p.y[near], a[near], inside[near]
    # Hairs lean outward; at the inner end they stand upright.
    lean = np.radians(42 - 36 * a)
    across, along = np.cos(lean) * y - np.sin(lean) * side * x, np.cos(lean) * side * x + np.sin(lean) * y
    hairs = noise.at(noise.table(0.8, 6), across * 150 + who.texture % 61, along * 70)
    soft = ramp(inside + 0.008 * hairs, -0.012, 0.016) * ramp(np.abs(a), 1.06, 0.9)
    density = np.clip(0.82 + 0.16 * hairs, 0.2, 1) * (0.72 + 0.2 * who.masculine + 0.08 * who.makeup)
    tint = linear(who.hair_colour) * 0.62 + 0.004
    part = albedo[near]
    mix(part, tint, (soft * density).astype(np.float32))
    albedo[near] = part
    label[np.flatnonzero(near)[(inside > 0) & (np.abs(a) <= 1)]] = which


def _lips(who: Identity, f: Features, p: Points, albedo: Floats, gloss: Floats, label: NDArray[np.uint8]) -> None:
    near = (np.abs(p.x) < f.mouth_half * 1.2) & (np.abs(p.y - f.mouth_y) < 0.42) & (p.z > 0.2)
    x, y = p.x[near], p.y[near]
    a = x / f.mouth_half
    upper_out, upper_in, lower_in, lower_out = f.lips(a)
    part, shine, classes = albedo[near], gloss[near], label[near]
    width = p.pixel + 0.006
    within = ramp(np.abs(a), 1.01, 0.97)
    lip = ramp(np.minimum(upper_out - y, y - lower_out), -width, width) * within
    creases = noise.at(noise.table(0.8, 6), x * 170 + who.texture % 71, y * 40)
    natural = part * np.array([0.86, 0.56, 0.56], np.float32)
    rouge = linear(LIPSTICK) * (1.15 - 0.5 * who.melanin)
    tint = natural + (rouge - natural) * (0.75 * who.makeup)
    tint *= (1 + 0.07 * creases + 0.1 * (y < lower_in))[:, None]
    mix(part, tint.astype(np.float32), (lip * (0.8 + 0.2 * who.makeup)).astype(np.float32))
    shine += lip * (0.5 + 0.9 * who.makeup)
    opened = f.gap_upper + f.gap_lower
    seam = np.exp(-(((y - np.where(y > (upper_in + lower_in) / 2, upper_in, lower_in)) / 0.0085) ** 2)) * within
    part *= (1 - 0.62 * seam * (np.abs(a) < 1))[:, None]
    corner = np.exp(-(((np.abs(a) - 1) / 0.07) ** 2) - ((y - upper_in) / 0.02) ** 2)
    part *= (1 - 0.45 * corner)[:, None]
    if opened > 0.004:
        hole = ramp(np.minimum(upper_in - y, y - lower_in), -0.5 * width, 0.7 * width) * (np.abs(a) < 1)
        inside = np.tile(np.array([0.05, 0.014, 0.013], np.float32), (len(x), 1))
        tongue = ramp(lower_in + 0.055 - y, 0, 0.04) * ramp(np.abs(a), 0.7, 0.3)
        mix(inside, np.array([0.28, 0.08, 0.08], np.float32), tongue * (opened > 0.05))
        edge = upper_in + 0.012 - (0.062 - 0.022 * a * a)
        tooth = np.abs(((np.abs(x) / (0.042 - 0.013 * np.abs(a))) % 1) - 0.5)
        teeth = ramp(y - edge - 0.012 * ramp(tooth, 0.35, 0.5), 0, 0.008) * ramp(np.abs(a), 0.86, 0.7)
        ivory = (
            np.array([0.72, 0.68, 0.59], np.float32)
            * (0.95 - 0.55 * np.abs(a) - 0.25 * ramp(tooth, 0.42, 0.5))[:, None]
        )
        mix(inside, ivory.astype(np.float32), teeth)
        inside *= (0.45 + 0.55 * ramp(upper_in - y, -0.005, 0.03))[:, None]
        mix(part, inside, hole)
        shine *= 1 - 0.9 * hole
    classes[(np.abs(a) < 1) & (y < upper_out) & (y >= upper_in)] = Label.UPPER_LIP
    classes[(np.abs(a) < 1) & (y < upper_in) & (y > lower_in)] = Label.MOUTH
    classes[(np.abs(a) < 1) & (y <= lower_in) & (y > lower_out)] = Label.LOWER_LIP
    albedo[near], gloss[near], label[near] = part, shine, classes


def _lashes(who: Identity, f: Features, p: Points, albedo: Floats, side: int) -> None:
    a = (side * p.x - f.eye_x) / f.eye_half
    near = (np.abs(a) < 1.4) & (np.abs(p.y) < 0.2) & (p.z > 0)
    a, y = a[near], p.y[near]
    upper, lower = f.lids(a)
    wide = ramp(np.abs(a), 1.15, 0.95)
    fold = upper + 0.026 + 0.012 * (1 - who.hooded) - 0.012 * a * a
    crease = np.exp(-(((y - fold) / 0.009) ** 2)) * ramp(np.abs(a - 0.1), 1.25, 0.8) * (0.34 + 0.12 * who.age)
    dark = 0.55 + 0.4 * who.makeup
    thick = 0.008 + 0.006 * who.makeup + 0.004 * np.clip(a, 0, 1)
    lash = np.exp(-(((y - upper - 0.004) / thick) ** 2)) * wide * dark
    lash = np.maximum(lash, np.exp(-(((y - lower + 0.003) / 0.006) ** 2)) * wide * (0.25 + 0.35 * who.makeup))
    shadow = ramp(fold - y, -0.03, 0.02) * (y > upper) * 0.4 * who.makeup * ramp(np.abs(a), 1.2, 0.7)
    part = albedo[near]
    part *= (1 - crease)[:, None] * (1 - shadow[:, None] * np.array([0.5, 0.8, 0.7], np.float32))
    mix(part, np.array([0.012, 0.008, 0.007], np.float32), lash.astype(np.float32))
    albedo[near] = part


def _eye(
    parameters: FaceParameters,
    f: Features,
    p: Points,
    colour: Floats,
    label: NDArray[np.uint8],
    light: Light,
    side: int,
    which: int,
) -> None:
    who, now = parameters.identity, parameters.scene
    a = (side * p.x - f.eye_x) / f.eye_half
    near = (np.abs(a) < 1.05) & (np.abs(p.y) < 0.15) & (p.z > 0)
    x, y, a = p.x[near], p.y[near], a[near]
    upper, lower = f.lids(a)
    inside = np.minimum(upper - y, y - lower)
    cover = ramp(inside, -0.5 * p.pixel - 0.002, 0.5 * p.pixel + 0.002) * (np.abs(a) < 1.02)
    iris_r = 0.066
    cx, cy = side * f.eye_x + 0.05 * now.gaze[0], 0.012 + 0.02 * now.gaze[1]
    dx, dy = (x - cx) / iris_r, (y - cy) / iris_r
    r = np.sqrt(dx * dx + dy * dy)
    ball = np.tile(np.array([0.70, 0.66, 0.63], np.float32), (len(x), 1))
    ball *= (1 - 0.28 * a * a)[:, None]
    pink = ramp(-a, 0.78, 0.98)
    mix(ball, np.array([0.5, 0.24, 0.2], np.float32), 0.8 * pink)
    tone = linear(who.iris)
    rays = noise.at(noise.table(1.2, 6), np.arctan2(dy, dx) * 40, r * 20)
    iris = tone * (1.35 - 0.25 * r + 0.22 * rays + 0.45 * ramp(-dy, -0.2, 0.8))[:, None]
    iris *= (1 - 0.75 * ramp(r, 0.78, 1.0))[:, None]
    soft = p.pixel / iris_r * 0.7
    mix(ball, iris.astype(np.float32), ramp(r, 1 + soft, 1 - soft))
    mix(ball, np.full(3, 0.006, np.float32), ramp(r, 0.42 + soft, 0.42 - soft))
    # The lid and its lashes shade the eyeball from above.
    ball *= (0.42 + 0.58 * ramp(upper - y, 0.0, 0.04))[:, None]
    facing = np.clip(light.towards[2] * 0.8 + 0.25, 0.15, 1)
    ball *= light.colour * (facing * (0.45 + 0.55 * p.lit[near]))[:, None] + light.ambient * 0.75
    gx, gy = 0.34 * np.sign(light.towards[0] + 1e-6), 0.36
    glint = np.exp(-(((dx - gx) ** 2 + (dy - gy) ** 2) / (0.03 + soft * soft * 0.3)))
    glint = glint + 0.25 * np.exp(-(((dx + gx) ** 2 + (dy + gy) ** 2) / 0.04))
    mix(ball, np.ones(3, np.float32), (0.85 * np.clip(glint, 0, 1)).astype(np.float32))
    part = colour[near]
    mix(part, ball, cover.astype(np.float32))
    colour[near] = part
    label[np.flatnonzero(near)[(inside > 0) & (np.abs(a) <= 1)]] = which
