"""Hair and hats that sit on the skull: where they grow, how thick they are, and how strands take the light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mcf.data.faces import chart, noise
from mcf.data.faces.chart import Floats
from mcf.data.faces.features import ramp
from mcf.data.faces.head import Head
from mcf.data.faces.light import Light, linear
from mcf.data.faces.parameters import FaceParameters, Identity

NOWHERE = -9.0
# Height of the hair line at these angles from the front (degrees), for hair that leaves the ears free.
AZIMUTHS = (0, 22, 42, 57, 68, 78, 86, 104, 125, 180)
HAIRLINE = (0.68, 0.67, 0.60, 0.43, 0.20, -0.02, -0.12, 0.02, -0.5, -0.55)
RECEDED = (0.76, 0.9, 0.9, 0.60, 0.24, -0.02, -0.10, 0.02, -0.5, -0.55)
FRINGE = (0.30, 0.29, 0.27, 0.24, 0.16, -0.04, -0.14, 0.00, -0.5, -0.55)
THICKNESS = {
    "bald": 0.0,
    "buzz": 0.014,
    "short": 0.085,
    "side": 0.11,
    "fringe": 0.11,
    "curly": 0.17,
    "afro": 0.34,
    "bob": 0.13,
    "long": 0.12,
    "receding": 0.05,
    "tied": 0.05,
}
HANGING = ("bob", "long")


@dataclass(frozen=True)
class Cover:
    """Tables over the chart: the surface with hair or hat on it, and how far inside their lines a point is."""

    radius: Floats
    hair: Floats  # signed distance to the hair line, positive inside, in head units
    hat: Floats


def hanging_end(who: Identity) -> float:
    """y where hanging hair ends."""
    return -(0.62 + 0.3 * who.hair_length) if who.hair_style == "bob" else -(1.15 + 0.5 * who.hair_length)


def cover(parameters: FaceParameters, head: Head) -> Cover:
    """Grow the hair and put on the hat."""
    who, now = parameters.identity, parameters.scene
    x, y, z = head.base[..., 0], head.base[..., 1], head.base[..., 2]
    azimuth = np.degrees(np.arctan2(x, z))
    angle = np.abs(azimuth)
    style = who.hair_style
    radius = head.radius
    hair = np.full_like(radius, NOWHERE)
    uneven = np.roll(noise.table(7, 7), who.texture % 256, axis=1)[: chart.CELLS, : chart.CELLS]
    if style != "bald":
        shape = {"receding": RECEDED, "fringe": FRINGE}.get(style, HAIRLINE)
        if style in HANGING and who.part > 0.45:
            shape = FRINGE
        line = np.interp(angle, AZIMUTHS, shape) + 0.05 * who.hairline
        if style in ("side", "bob", "long") and shape is HAIRLINE:
            # A parting: the line falls away from it on both sides.
            line -= 0.16 * ramp(np.abs(azimuth - 38 * who.part), 6, 60) * ramp(angle, 75, 35)
        hair = y - line - 0.012 * uneven
        thick = THICKNESS[style] * who.hair_volume * (0.62 + 0.5 * ramp(y, 0.0, 1.0))
        lumps = 0.16 if style in ("curly", "afro") else 0.09
        relief = thick * ramp(hair, -0.01, 0.24 if style == "afro" else 0.16) * (1 + lumps * uneven)
        radius = radius + relief.astype(np.float32)
    if style in HANGING:
        n = chart.directions()
        edge = 66 + 7 * who.wave + 3 * uneven
        rho = (0.83 + 0.06 * who.hair_volume + 0.03 * uneven) * who.width
        flat = np.sqrt(np.maximum(1 - n[..., 1] ** 2, 0.05))
        down = np.maximum(-n[..., 1], 0.05)
        drape = np.minimum(rho / flat, -hanging_end(who) / down)
        share = ramp(angle, edge - 4, edge + 12) * ramp(n[..., 1], 0.35, 0.0) * ramp(np.abs(n[..., 0]), 0.25, 0.5)
        radius = np.maximum(radius, radius + (drape - radius) * share)
        # Away from where it hangs the distance must fall quickly, or single strands would lie across the face.
        beside = np.minimum((angle - edge) * 0.013 + 0.05, (np.abs(n[..., 0]) - 0.27) * 0.5)
        locks = np.minimum((share - 0.08) * 0.5, beside)
        hair = np.maximum(hair, np.where(n[..., 1] < 0.3, locks, NOWHERE))
    hat = np.full_like(radius, NOWHERE)
    if now.hat != "none":
        tall = {"beanie": 0.09, "cap": 0.06, "brim": 0.1}[now.hat]
        hat = y - np.interp(angle, (0, 60, 90, 180), (0.42, 0.36, 0.24, 0.1))
        bare = head.radius + 0.02
        grown = bare + tall * ramp(hat, -0.01, 0.07) + (0.05 * ramp(hat, 0.2, 0.6) if now.hat != "cap" else 0)
        radius = np.where(hat > 0, grown, np.minimum(radius, head.radius + 0.09 + 0.3 * ramp(hat, 0, -0.2)))
    return Cover(np.ascontiguousarray(radius, np.float32), hair.astype(np.float32), hat.astype(np.float32))


def strands(who: Identity, n: Floats) -> tuple[Floats, Floats]:
    """Grain [N] (deviation about 1) and tangents [N, 3] of hair combed away from the parting, at directions n [N, 3]."""
    pole = np.array([0.3 * who.part, 0.85, -0.3], np.float32)
    pole /= np.linalg.norm(pole)
    right = np.cross(pole, [0, 0, 1.0]).astype(np.float32)
    right /= np.linalg.norm(right)
    front = np.cross(right, pole)
    cosine = n @ pole
    turn = np.arctan2(n @ right, -(n @ front))
    seed = who.texture % 997
    if who.hair_style in ("afro", "curly"):
        size = 90 if who.hair_style == "afro" else 46
        knots = noise.table(2.2, 2.2)
        grain = noise.at(knots, n[:, 0] * size + seed, n[:, 1] * size) * 0.8
        grain += noise.at(knots, n[:, 0] * size * 2 + n[:, 2] * 60, n[:, 1] * size * 2) * 0.5
    else:
        bend = who.wave * 0.09 * ramp(cosine, -0.9, 0.2) * np.sin(cosine * (9 + 6 * who.wave) + 2.5 * turn)
        u = (turn + bend) * 60 + seed
        grain = noise.at(noise.table(0.7, 16), u, cosine * 40) * 0.62
        grain += noise.at(noise.table(2.5, 20), u * 0.6, cosine * 30 + 99) * 0.75
    tangent = pole - n * cosine[:, None]
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-4)
    return grain, tangent


def shade_strands(who: Identity, grain: Floats, tangent: Floats, normal: Floats, lit: Floats, light: Light) -> Floats:
    """Linear colours [N, 3] of hair: Kajiya and Kay's two cosines, tamed by the surface's own normal."""
    colour = linear(who.hair_colour)
    albedo = colour * np.clip(1 + 0.42 * grain, 0.25, 2.2)[:, None]
    along = tangent @ light.towards
    diffuse = np.sqrt(np.clip(1 - along * along, 0, 1)) * (0.25 + 0.75 * np.clip(normal @ light.towards, 0, 1))
    half = tangent @ light.half
    sheen = np.clip(1 - half * half, 0, 1) ** 28 * np.clip(normal @ light.half, 0, 1) ** 2
    if who.hair_style in ("afro", "curly", "buzz"):
        sheen = sheen * 0.25
    sky = light.ambient * (0.45 + 0.4 * np.clip(normal[:, 1:2] * 0.5 + 0.5, 0, 1))
    out = albedo * (light.colour * (diffuse * lit)[:, None] + sky)
    gloss = (0.35 * colour + 0.035) * np.clip(1 + 0.6 * grain, 0, 2)[:, None]
    return (out + gloss * light.colour * (sheen * lit)[:, None]).astype(np.float32)
