"""Light: one lamp, a sky and a ground, and what skin and cloth make of them. Colours are linear here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcf.data.faces.chart import Floats
from mcf.data.faces.parameters import Scene

GAMMA = 2.0  # near enough to sRGB's 2.2, and a square root is quick
# Light seeps through skin, red most: how far it reaches around the terminator.
SKIN_WRAP = np.array([0.34, 0.16, 0.10], np.float32)


@dataclass(frozen=True)
class Light:
    """Directions are unit vectors in the coordinates in which normals are given."""

    towards: Floats
    half: Floats  # between the lamp and the viewer
    view: Floats
    colour: Floats
    ambient: Floats

    def turned(self, back: Floats) -> Light:
        """The same light seen from other axes: `back` [3, 3] takes this one's to those."""
        return Light(back @ self.towards, back @ self.half, back @ self.view, self.colour, self.ambient)


def of(scene: Scene) -> Light:
    """The scene's light in camera coordinates."""
    azimuth, elevation = np.radians(scene.light)
    towards = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    half = towards + (0, 0, 1)
    colour = np.array(scene.light_colour) * scene.light_power
    return Light(
        towards.astype(np.float32),
        (half / np.linalg.norm(half)).astype(np.float32),
        np.array([0, 0, 1], np.float32),
        colour.astype(np.float32),
        (np.array(scene.ambient_colour) * scene.ambient).astype(np.float32),
    )


def linear(srgb: Sequence[float] | Floats) -> Floats:
    """Linear light of an sRGB colour (0–1)."""
    return np.asarray(srgb, np.float32) ** np.float32(GAMMA)


def shade(
    albedo: Floats, normal: Floats, lit: Floats, open_sky: Floats, gloss: Floats | float, light: Light, wrap: Floats
) -> Floats:
    """Linear colours [N, 3] of a soft surface.

    `lit` [N] is the share of the lamp that arrives, `open_sky` [N] that of the surroundings, `gloss` the strength of
    the highlight, `wrap` [3] how far light reaches around the terminator.
    """
    facing = normal @ light.towards
    diffuse = np.clip((facing[:, None] + wrap) / (1 + wrap), 0, None)
    # In shadow, what seeps in is red as well.
    arrives = lit[:, None] ** (1 - 0.5 * wrap)
    up = (normal[:, 1] * 0.5 + 0.5)[:, None]
    sky = light.ambient * (0.62 + 0.38 * up) * open_sky[:, None]
    spot = np.clip(normal @ light.half, 0, 1)
    s2 = spot * spot
    s8 = s2 * s2 * s2 * s2
    s32 = s8 * s8 * s8 * s8
    highlight = (0.07 * s8 + 0.14 * s32) * lit * gloss * np.clip(facing * 4, 0, 1)
    rim = (1 - np.clip(normal @ light.view, 0, 1)) ** 4 * 0.12
    return (
        albedo * (light.colour * (diffuse * arrives) + sky + rim[:, None] * light.ambient)
        + highlight[:, None] * light.colour
    ).astype(np.float32)
