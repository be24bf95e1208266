"""What is around the face: backdrop, neck, cloth, hair that hangs behind, ears, glasses, brims, jewels."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy import ndimage

from mcf.data.faces import noise
from mcf.data.faces.canvas import Canvas, ellipsoid
from mcf.data.faces.chart import Floats
from mcf.data.faces.features import Features, ramp
from mcf.data.faces.hair import HANGING, hanging_end
from mcf.data.faces.light import SKIN_WRAP, Light, linear, shade
from mcf.data.faces.paint import Label, mix, skin_tone
from mcf.data.faces.parameters import FaceParameters

NO_WRAP = np.array([0.1, 0.1, 0.1], np.float32)
UPRIGHT = np.eye(3, dtype=np.float32)
NAPE = 0.45  # from the jaw's height to where the neck ends in the skull


def backdrop(canvas: Canvas, parameters: FaceParameters) -> None:
    """Fill the canvas: out-of-focus surroundings in three colours."""
    now = parameters.scene
    side = min(canvas.side, 96)  # out of focus: a small picture is enough
    rng = np.random.default_rng(now.texture)
    t = (np.arange(side, dtype=np.float32) + 0.5) / side
    grid_x, grid_y = np.meshgrid(t, t)
    x, y = grid_x.ravel(), grid_y.ravel()
    first, second, third = (linear(c) for c in now.backdrop_colours)
    slope = rng.uniform(-1, 1, 2)
    share = ramp(slope[0] * (x - 0.5) + slope[1] * (y - 0.5), -0.6, 0.6)
    picture = np.tile(first, (side * side, 1))
    mix(picture, second, share)
    if now.backdrop == "blobs":
        for _ in range(9):
            cx, cy, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.04, 0.2)
            d = np.sqrt((x - cx) ** 2 + (y - cy) ** 2) / r
            mix(picture, np.clip(third * rng.uniform(0.4, 1.8), 0, 1), ramp(d, 1.1, 0.8) * rng.uniform(0.2, 0.7))
    elif now.backdrop == "panels":
        for _ in range(5):
            edge, wide, soft = rng.uniform(-0.1, 1), rng.uniform(0.05, 0.4), rng.uniform(0.01, 0.06)
            along = (x, y)[int(rng.uniform() < 0.3)] + rng.uniform(-0.15, 0.15) * (y, x)[int(rng.uniform() < 0.3)]
            band = ramp(along, edge, edge + soft) * ramp(along, edge + wide, edge + wide - soft)
            mix(picture, np.clip((second, third)[int(rng.integers(2))] * rng.uniform(0.5, 1.4), 0, 1), 0.8 * band)
    elif now.backdrop == "foliage":
        leaves = noise.at(noise.table(4, 4), x * 150 + rng.uniform(0, 256), y * 150)
        leaves += noise.at(noise.table(9, 9), x * 150 + rng.uniform(0, 256), y * 150)
        mix(picture, third, ramp(leaves, -0.4, 1.2) * 0.8)
        mix(picture, np.clip(first * 2, 0, 1), ramp(leaves, 1.2, 2.2) * 0.7)
    picture = ndimage.gaussian_filter(picture.reshape(side, side, 3), (1.4, 1.4, 0), mode="nearest")
    full = (canvas.side, canvas.side)
    for channel in range(3):
        plane = Image.fromarray(np.ascontiguousarray(picture[..., channel], np.float32))
        canvas.colour[:, channel] = np.asarray(plane.resize(full, Image.Resampling.BILINEAR)).ravel()


def hair_behind(canvas: Canvas, parameters: FaceParameters, turn: Floats, light: Light) -> None:
    """The part of hanging hair that falls behind neck and shoulders."""
    who = parameters.identity
    if who.hair_style not in HANGING:
        return
    middle = turn @ np.array([0, 0, -0.35], np.float32)
    end = hanging_end(who)
    at, x, y = canvas.box(middle[0] - 1.4, middle[0] + 1.4, end - 0.15, 0.5)
    x = x - middle[0]
    seed = who.texture % 127
    wide = who.width * (0.86 + 0.1 * who.hair_volume) + 0.04 * np.sin(y * (3 + 5 * who.wave) + seed) * (1 + who.wave)
    wide = wide + 0.12 * ramp(y, 0.0, end)
    wide = wide * np.sqrt(np.clip(1 - (np.maximum(y, 0) / 0.9) ** 2, 0, 1)) * (1 - 0.25 * ramp(y, -0.1, 0.3))
    tips = noise.at(noise.table(2, 2), np.abs(x) * 60 + seed, y * 0) * 0.05
    inside = np.minimum(wide + 0.01 * tips - np.abs(x), y - end - tips - 0.16 * x * x)
    cover = ramp(inside, -canvas.pixel, canvas.pixel)
    grain = noise.at(noise.table(0.7, 16), (x + 0.05 * who.wave * np.sin(y * 9)) * 110 + seed, y * 30 * 1.4)
    grain += 0.7 * noise.at(noise.table(2.5, 20), x * 70 + seed, y * 30)
    round_ = 0.35 + 0.65 * np.clip(1 - (x / wide) ** 2, 0, 1) + 0.25 * light.towards[0] * x
    colour = linear(who.hair_colour) * (np.clip(1 + 0.35 * grain, 0.3, 2) * round_)[:, None]
    colour = colour * (light.colour * 0.42 + light.ambient * 0.5)
    canvas.put(at, colour.astype(np.float32), cover, int(Label.HAIR), np.full(len(at), -5, np.float32))


def body(canvas: Canvas, parameters: FaceParameters, f: Features, turn: Floats, light: Light) -> None:
    """Neck, cloth and necklace; `canvas` must not hold the head yet."""
    who, now = parameters.identity, parameters.scene
    jaw = turn @ np.array([0, f.chin + 0.3, -0.12], np.float32)
    nape = turn @ np.array([0, f.chin + 0.3 + NAPE, -0.42], np.float32)
    lean = 0.25 * math.tan(math.radians(now.roll))
    at, x, y = canvas.box(-9, 9, -9, jaw[1] + NAPE)
    down = jaw[1] - y
    centre = jaw[0] - lean * np.clip(down, 0, 1.2) - 0.12 * jaw[0] * np.clip(down, 0, 1)
    side = x - centre
    neck = (0.43 + 0.09 * who.masculine) * who.width
    flare = 0.4 * np.maximum(0, down - 0.3) ** 1.6 + 2.0 * np.maximum(0, down - 0.52) ** 1.05
    # Above the jaw the neck leans to the nape and narrows, so that the head hides its end.
    up = np.clip(-down / NAPE, 0, 1)
    side = side - up * (nape[0] - jaw[0])
    outline = neck * (1 - 0.4 * up) + 0.05 * np.clip(down, 0, 0.4) + flare
    some = np.abs(side) < outline + 0.05
    at, x, y, down, side, outline = (values[some] for values in (at, x, y, down, side, outline))
    across = side / np.maximum(outline, 0.05)
    # Shoulders are nearly level: across them an edge is steeper in y than in x.
    slope = np.sqrt(1 + (0.64 * np.maximum(0, down - 0.3) ** 0.6 + 2.1 * (down > 0.52)) ** 2)
    cover = ramp((outline - np.abs(side)) / slope, -canvas.pixel, canvas.pixel)
    round_ = np.clip(side / (neck * 1.25), -1, 1) * np.exp(-(np.maximum(0, np.abs(side) - neck) * 1.5))
    normal = np.stack([round_ * 0.92, np.full_like(x, 0.05) + 0.35 * ramp(down, 0.5, 0.9), np.zeros_like(x)], axis=1)
    normal[:, 2] = np.sqrt(np.clip(1 - (normal**2).sum(axis=1), 0.02, 1))
    # The chin keeps the lamp and half of the sky from the throat.
    shade_edge = 0.30 + 0.35 * max(0.0, float(light.towards[1])) + 0.15 * np.cos(side * 2.2)
    lit = 0.12 + 0.88 * ramp(down + 0.25 * side * float(light.towards[0]), shade_edge - 0.12, shade_edge + 0.22)
    sky = 0.55 + 0.4 * ramp(down, 0.2, 0.75)
    skin = np.tile(skin_tone(who) * np.array([0.94, 0.9, 0.88], np.float32), (len(at), 1))
    muscle = np.exp(-(((np.abs(side) - 0.27 + 0.28 * np.clip(down, 0, 0.75)) / 0.05) ** 2)) * ramp(down, 0.1, 0.5)
    hollow = np.exp(-((side / 0.05) ** 2) - ((down - 0.83) / 0.06) ** 2)
    bones = np.exp(-(((down - 0.86 + 0.12 * np.abs(side)) / 0.03) ** 2)) * ramp(np.abs(side), 0.08, 0.25)
    skin *= (1 + 0.1 * muscle - 0.22 * hollow + 0.09 * bones)[:, None]
    colour = shade(skin, normal, lit.astype(np.float32), sky.astype(np.float32), 0.5, light, SKIN_WRAP)
    far = np.full(len(at), -4, np.float32)
    canvas.put(at, colour, cover, int(Label.NECK), far)

    depth_of = {"round": 0.58 - 0.2 * np.abs(side), "v": 0.9 - 0.75 * np.abs(side), "high": 0.36 - 0.05 * np.abs(side)}
    collar = down - depth_of[now.collar] - 0.28 * (now.collar == "round") * (1 - np.clip(side / 0.5, -1, 1) ** 2)
    cloth = linear(now.cloth_colour)
    weave = noise.at(noise.table(0.7, 0.7), x * 190, y * 190)
    folds = noise.at(noise.table(12, 12), x * 50 + now.texture % 97, y * 25)
    fabric = np.tile(cloth, (len(at), 1)) * (1 + 0.05 * weave + 0.13 * folds)[:, None]
    hem = np.exp(-(((collar - 0.05) / 0.008) ** 2)) * 0.3 + 0.18 * ramp(collar, 0.05, 0.0)
    fabric *= (1 - hem)[:, None]
    bulge = np.stack([0.75 * across * np.abs(across), 0.45 + 0.1 * folds, np.zeros_like(x)], axis=1).astype(np.float32)
    bulge[:, 2] = np.sqrt(np.clip(1 - (bulge**2).sum(axis=1), 0.05, 1))
    colour = shade(fabric, bulge, (0.35 + 0.65 * lit).astype(np.float32), sky.astype(np.float32), 0.1, light, NO_WRAP)
    collar_cover = ramp(collar, -canvas.pixel, canvas.pixel)
    wide = ramp((outline + 0.02 - np.abs(side)) / slope, -canvas.pixel, canvas.pixel)
    canvas.put(at, colour, collar_cover * wide, int(Label.CLOTH), far)
    if now.necklace:
        chain = down - 0.6 - 0.24 * (1 - np.clip(side / 0.48, -1, 1) ** 2)
        bead = 0.6 + 0.4 * np.cos(side * 140)
        thick = 0.014 + 0.4 * canvas.pixel
        cover = ramp(np.abs(chain), thick + canvas.pixel, thick - canvas.pixel) * (np.abs(side) < 0.46)
        cover = cover * (collar < 0.02)
        gold = linear(now.metal) * ((0.35 + 0.9 * bead)[:, None] * (light.colour + 0.5 * light.ambient))
        canvas.put(at, gold.astype(np.float32), cover, int(Label.NECKLACE), far)


def ears(canvas: Canvas, parameters: FaceParameters, turn: Floats, light: Light) -> None:
    """Both ears; the head hides what lies behind it."""
    who, now = parameters.identity, parameters.scene
    for side, which in ((1, Label.LEFT_EAR), (-1, Label.RIGHT_EAR)):
        out = np.radians(26 * side)
        tilt = np.array([[np.cos(out), 0, -np.sin(out)], [0, 1, 0], [np.sin(out), 0, np.cos(out)]], np.float32)
        centre = np.array([side * 0.755 * who.width, -0.1, -0.16], np.float32)
        radii = np.array([0.05, 0.2, 0.125], np.float32) * np.float32(who.ear)
        visible = ellipsoid(canvas, turn, centre, radii, tilt)
        if visible is None:
            continue
        at, depth, cover, normal, own = visible
        # The lobe is narrower than the upper rim.
        cover = (
            cover
            * ramp(np.abs(own[:, 2]), 1.02, 0.98)
            * ramp(np.abs(own[:, 2]), 0.75 + 0.3 * own[:, 1] + 0.35, 0.7 + 0.3 * own[:, 1] + 0.3)
        )
        ring = np.sqrt(own[:, 1] ** 2 + own[:, 2] ** 2)
        groove = np.exp(-(((ring - 0.7) / 0.1) ** 2)) * ramp(own[:, 1], -0.6, -0.1)
        shell = np.exp(-((own[:, 1] + 0.1) ** 2 / 0.13) - ((own[:, 2] - 0.2) ** 2 / 0.16))
        albedo = np.tile(skin_tone(who) * np.array([1.0, 0.84, 0.82], np.float32), (len(at), 1))
        albedo *= (1 - 0.42 * groove - 0.5 * shell)[:, None]
        lit = np.full(len(at), 0.8, np.float32)
        colour = shade(albedo, normal, lit, np.full(len(at), 0.75, np.float32), 0.35, light, SKIN_WRAP)
        canvas.put(at, colour, cover, int(which), depth)
        if now.earrings:
            _earring(
                canvas, parameters, turn, light, centre + np.array([side * 0.01, -0.19 * who.ear, 0.04], np.float32)
            )


def _earring(canvas: Canvas, parameters: FaceParameters, turn: Floats, light: Light, centre: Floats) -> None:
    long = parameters.identity.texture % 3
    radii = np.array([0.035, (0.04, 0.1, 0.16)[long], 0.035], np.float32)
    visible = ellipsoid(canvas, turn, centre - np.array([0, radii[1], 0], np.float32), radii, UPRIGHT)
    if visible is None:
        return
    at, depth, cover, normal, _ = visible
    shine = np.clip(normal @ light.half, 0, 1)
    metal = linear(parameters.scene.metal) * (0.25 + 0.6 * shine + 1.2 * shine**16)[:, None]
    canvas.put(at, (metal * (light.colour + light.ambient)).astype(np.float32), cover, int(Label.EARRING), depth)


def brim(canvas: Canvas, parameters: FaceParameters, turn: Floats, light: Light) -> None:
    """The brim of a cap or of a hat."""
    now = parameters.scene
    if now.hat not in ("cap", "brim"):
        return
    cap = now.hat == "cap"
    slope = np.radians(16 if cap else 6)
    tilt = np.array([[1, 0, 0], [0, np.cos(slope), np.sin(slope)], [0, -np.sin(slope), np.cos(slope)]], np.float32).T
    centre = np.array([0, 0.43, 0.72] if cap else [0, 0.38, -0.05], np.float32)
    radii = np.array([0.62, 0.055, 0.52] if cap else [1.32, 0.06, 1.38], np.float32)
    visible = ellipsoid(canvas, turn, centre, radii, tilt)
    if visible is None:
        return
    at, depth, cover, normal, _ = visible
    albedo = np.tile(linear(now.hat_colour) * 0.85, (len(at), 1))
    under = 0.35 + 0.65 * ramp(normal[:, 1], -0.3, 0.2)
    colour = shade(albedo, normal, under, under, 0.2, light, NO_WRAP)
    canvas.put(at, colour, cover, int(Label.HAT), depth)


def glasses(canvas: Canvas, parameters: FaceParameters, f: Features, turn: Floats, light: Light) -> None:
    """Frames and lenses in a plane before the eyes, with temples to the ears."""
    now = parameters.scene
    kind = now.glasses
    if kind == "none":
        return
    width = parameters.identity.width
    plane, tilt_y = np.float32(0.93), -0.01
    corner = turn @ np.array([0, 0, plane], np.float32)
    at, x, y = canvas.box(corner[0] - 0.75, corner[0] + 0.75, corner[1] - 0.55, corner[1] + 0.55)
    # Points (gx, gy, plane) of the head that project to (x, y).
    inverse = np.linalg.inv(turn[:2, :2]).astype(np.float32)
    gx = inverse[0, 0] * (x - corner[0]) + inverse[0, 1] * (y - corner[1])
    gy = inverse[1, 0] * (x - corner[0]) + inverse[1, 1] * (y - corner[1]) - np.float32(tilt_y)
    depth = turn[2, 0] * gx + turn[2, 1] * gy + turn[2, 2] * plane + np.float32(0.05)
    rx, ry, power = {"round": (0.215, 0.195, 2.0), "square": (0.235, 0.165, 4.0), "sun": (0.245, 0.19, 3.0)}[kind]
    lens_x = np.abs(gx) - (f.eye_x + 0.005)
    r = ((np.abs(lens_x) / rx) ** power + (np.abs(gy) / ry) ** power) ** (1 / power)
    distance = (r - 1) * min(rx, ry)
    thick = (0.012, 0.02, 0.03)[parameters.identity.texture % 3] if kind != "sun" else 0.022
    thick = max(thick, 0.55 * canvas.pixel)
    rim = ramp(np.abs(distance), thick + canvas.pixel / 2, thick - canvas.pixel / 2)
    gap = f.eye_x + 0.005 - rx
    bridge = np.abs(gy - 0.045 + 0.9 * gx * gx) - thick
    rim = np.maximum(rim, ramp(bridge, canvas.pixel / 2, -canvas.pixel / 2) * (np.abs(gx) < gap + 0.005))
    lens = ramp(distance, canvas.pixel / 2, -canvas.pixel / 2)
    tint = (
        linear(now.hat_colour) * 0.12 if parameters.identity.texture % 2 else np.array([0.01, 0.01, 0.011], np.float32)
    )
    sweep = 0.5 + 0.5 * np.tanh((gx * 1.5 + gy * 2.2 + 0.1 * now.light[0] / 40) * 6)
    before = canvas.label[at].copy()
    if kind == "sun":
        glass = np.array([0.012, 0.011, 0.012], np.float32) + 0.10 * np.outer(
            (gy / ry * 0.5 + 0.5).clip(0, 1) ** 2, light.ambient
        )
        glass = glass + 0.03 * sweep[:, None] * light.colour
        canvas.put(at, glass.astype(np.float32), 0.94 * lens, int(Label.GLASSES), depth)
    else:
        glare = np.clip(0.04 + 0.1 * ramp(np.abs(gx * 1.2 + gy - 0.12 - 0.1 * now.light[0] / 60), 0.08, 0.02), 0, 1)
        canvas.put(at, light.colour * 0.9, (glare * lens).astype(np.float32), None, depth)
        through = (Label.LEFT_EYE, Label.RIGHT_EYE, Label.LEFT_BROW, Label.RIGHT_BROW)
        inside = (lens > 0.5) & ~np.isin(before, through)
        canvas.label[at[inside]] = Label.GLASSES
    shine = (0.7 + 0.5 * ramp(gy, -0.1, 0.2))[:, None]
    canvas.put(at, (tint * shine * (light.colour + light.ambient)).astype(np.float32), rim, int(Label.GLASSES), depth)
    for side in (1, -1):
        hinge = turn @ np.array([side * (f.eye_x + rx), 0.05 + tilt_y, plane], np.float32)
        end = turn @ np.array([side * 0.79 * width, 0.03, -0.12], np.float32)
        _temple(canvas, hinge, end, thick, (tint * (light.colour + light.ambient)).astype(np.float32))


def _temple(canvas: Canvas, hinge: Floats, end: Floats, thick: float, colour: Floats) -> None:
    low, high = np.minimum(hinge, end) - 0.05, np.maximum(hinge, end) + 0.05
    at, x, y = canvas.box(low[0], high[0], low[1], high[1])
    if not len(at):
        return
    along = end - hinge
    share = ((x - hinge[0]) * along[0] + (y - hinge[1]) * along[1]) / max(float(along[:2] @ along[:2]), 1e-6)
    share = np.clip(share, 0, 1)
    away = np.hypot(x - hinge[0] - share * along[0], y - hinge[1] - share * along[1])
    cover = ramp(away, thick + canvas.pixel / 2, thick - canvas.pixel / 2)
    canvas.put(at, colour, cover, int(Label.GLASSES), (hinge[2] + share * along[2] + 0.02).astype(np.float32))
