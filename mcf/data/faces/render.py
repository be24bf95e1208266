"""From parameters to a picture with its landmarks and mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mcf.data.faces import body, chart, hair, head, light, noise
from mcf.data.faces.canvas import Canvas
from mcf.data.faces.features import ramp
from mcf.data.faces.paint import Label, Points, mix, paint
from mcf.data.faces.parameters import FaceParameters


@dataclass(frozen=True)
class Face:
    """A drawn face."""

    image: NDArray[np.uint8]  # [size, size, 3] sRGB
    landmarks: NDArray[np.float64]  # [68, 2] x and y in pixels; the centre of the upper left pixel is (0.5, 0.5)
    mask: NDArray[np.uint8]  # [size, size], the classes of CelebAMask-HQ


def draw(parameters: FaceParameters, size: int = 256) -> Face:
    """Draw a face, `size` pixels square (64–1024 are tried)."""
    now = parameters.scene
    side = size * 3 // 2 if size < 200 else size * 4 // 3
    canvas = Canvas(side, now.scale, now.centre)
    turn = head.rotation(now.yaw, now.pitch, now.roll)
    lamp = light.of(now)
    skull = head.build(parameters)
    body.backdrop(canvas, parameters)
    body.hair_behind(canvas, parameters, turn, lamp)
    body.body(canvas, parameters, skull.features, turn, lamp)
    body.ears(canvas, parameters, turn, lamp)
    _head(canvas, parameters, skull, turn, lamp)
    body.glasses(canvas, parameters, skull.features, turn, lamp)
    body.brim(canvas, parameters, turn, lamp)

    at = ((np.arange(size) + 0.5) * side / size).astype(np.intp)
    mask = canvas.label.reshape(side, side)[np.ix_(at, at)]
    return Face(_develop(canvas, parameters, size), _pixels(parameters, skull, size), np.ascontiguousarray(mask))


def landmarks(parameters: FaceParameters, size: int = 256) -> NDArray[np.float64]:
    """The landmarks [68, 2] that `draw` gives, without drawing."""
    return _pixels(parameters, head.build(parameters), size)


def _pixels(parameters: FaceParameters, skull: head.Head, size: int) -> NDArray[np.float64]:
    now = parameters.scene
    points = head.project_landmarks(skull, head.rotation(now.yaw, now.pitch, now.roll))
    x = now.centre[0] * size + points[:, 0] * now.scale * size
    y = now.centre[1] * size - points[:, 1] * now.scale * size
    return np.stack([x, y], axis=1)


def _head(canvas: Canvas, parameters: FaceParameters, skull: head.Head, turn: chart.Floats, lamp: light.Light) -> None:
    """Cast the covered head into the canvas, and paint skin, hair and hat where each is seen."""
    who, now = parameters.identity, parameters.scene
    worn = hair.cover(parameters, skull)
    near = lamp.turned(turn.T)
    normals = chart.normals(worn.radius)
    lit = chart.shadow(worn.radius, normals, near.towards)
    hollow = worn.radius - ndimage.gaussian_filter(worn.radius, 4, mode="nearest")
    sky = np.clip(1 + 7 * hollow, 0.45, 1.08).astype(np.float32)
    table = np.concatenate([normals, np.stack([lit, sky, worn.hair, worn.hat], axis=-1)], axis=-1)
    at, (depth, cover, cx, cy) = chart.cast(worn.radius, turn, canvas.x, canvas.y)
    x, y, z = (turn[0, k] * cx + turn[1, k] * cy + turn[2, k] * depth for k in range(3))
    column, row, r = chart.locate(x, y, z)
    values = chart.bilinear(table, column, row)
    normal = values[:, :3] / np.maximum(np.linalg.norm(values[:, :3], axis=1, keepdims=True), 1e-6)
    # Deep under hair or hat no skin is seen.
    bare = np.flatnonzero((values[:, 5] < 0.09) & (values[:, 6] < 0.03))
    points = Points(x[bare], y[bare], z[bare], normal[bare], values[bare, 3], values[bare, 4], canvas.pixel)
    colour = np.zeros_like(normal)
    label = np.full(len(x), Label.SKIN, np.uint8)
    colour[bare], label[bare] = paint(parameters, skull.features, points, near)

    # In the valley between hair and skin little light arrives.
    colour *= (1 - 0.3 * ramp(values[:, 5], -0.1, 0.01))[:, None]
    hairy = np.flatnonzero(values[:, 5] > -0.09)
    if len(hairy):
        n = np.stack([x, y, z], axis=1)[hairy] / r[hairy, None]
        grain, tangent = hair.strands(who, n)
        ragged = {"buzz": 0.012, "fringe": 0.03}.get(who.hair_style, 0.02)
        edge = values[hairy, 5] + ragged * grain
        soft = 0.05 if who.hair_style == "buzz" else 0.018
        share = ramp(edge, -soft, soft) * (0.75 if who.hair_style == "buzz" else 1)
        shaded = hair.shade_strands(who, grain, tangent, normal[hairy], values[hairy, 3] * values[hairy, 4], near)
        part = colour[hairy]
        mix(part, shaded, share.astype(np.float32))
        colour[hairy] = part
        label[hairy[edge > 0]] = Label.HAIR
    hatted = np.flatnonzero(values[:, 6] > -0.02)
    if len(hatted):
        tone = np.tile(light.linear(now.hat_colour), (len(hatted), 1))
        turned = np.arctan2(x[hatted], z[hatted])
        if now.hat == "beanie":
            tone *= (0.86 + 0.14 * np.cos(turned * 60))[:, None]
            tone *= (1 - 0.25 * np.exp(-(((values[hatted, 6] - 0.2) / 0.012) ** 2)))[:, None]
        elif now.hat == "cap":
            tone *= (1 - 0.2 * np.exp(-((((turned + 0.4) % 0.8 - 0.4) / 0.012) ** 2)))[:, None]
        else:
            tone *= (1 - 0.55 * (values[hatted, 6] < 0.12))[:, None]
        tone *= (1 + 0.06 * noise.at(noise.table(0.7, 0.7), x[hatted] * 160, y[hatted] * 160))[:, None]
        shaded = light.shade(tone, normal[hatted], values[hatted, 3], values[hatted, 4], 0.1, near, body.NO_WRAP)
        part = colour[hatted]
        mix(part, shaded, ramp(values[hatted, 6], -canvas.pixel, canvas.pixel))
        colour[hatted] = part
        label[hatted[values[hatted, 6] > 0]] = Label.HAT
    canvas.put(at, colour, cover, label, depth)


def _develop(canvas: Canvas, parameters: FaceParameters, size: int) -> NDArray[np.uint8]:
    """Tone, size, lens and sensor: linear canvas to the final picture."""
    now = parameters.scene
    side = canvas.side
    tone = np.maximum(canvas.colour, 0)
    tone *= np.float32(1.12 * now.exposure)
    # A soft shoulder keeps highlights from clipping.
    tone = np.where(tone > 0.75, 0.75 + 0.25 * np.tanh((tone - 0.75) / 0.25), tone)
    encoded = (np.sqrt(tone) * 255 + 0.5).astype(np.uint8)
    picture = Image.fromarray(encoded.reshape(side, side, 3)).resize((size, size), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float32)
    if now.blur > 0:
        pixels = ndimage.gaussian_filter(pixels, (now.blur * size, now.blur * size, 0))
    rng = np.random.default_rng([now.texture, 7])
    grain = (
        rng.standard_normal((size, size, 1), np.float32) * 0.8 + rng.standard_normal((size, size, 3), np.float32) * 0.4
    )
    return np.clip(pixels + grain * (now.noise * 255) + 0.5, 0, 255).astype(np.uint8)
