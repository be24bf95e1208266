"""Where eyes, brows, nose and mouth are: curves in the frontal plane of the head, before any pose.

The same curves place the relief, the paint, the classes of the mask and the landmarks, so these agree by construction.
`side` is +1 for the image's right (the person's left) and −1 for the other; `a` runs along a feature, from −1 at its
end near the nose to +1 at its outer end (for the mouth from the image's left to its right).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcf.data.faces.chart import Floats
from mcf.data.faces.parameters import FaceParameters

CHIN = -1.13  # of the average head
JAW_POINTS = 17


def ramp(x: Floats | float, low: Floats | float, high: Floats | float) -> Floats:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


@dataclass(frozen=True)
class Features:
    """Positions and sizes of one face with its expression, in head units."""

    eye_x: float
    eye_half: float  # half the width of an eye
    eye_upper: float  # height of the upper lid over the line of the corners
    eye_lower: float
    eye_tilt: float
    brow_y: float
    brow_arch: float
    brow_thick: float  # half the thickness at its inner end
    brow_inner: float
    brow_outer: float
    nose_half: float  # half the width over the wings
    nose_base: float  # y where the nose meets the lip
    nose_tip: float  # y
    mouth_y: float
    mouth_half: float
    smile: float
    lip_upper: float
    lip_lower: float
    gap_upper: float  # how far the open lips are from the line of the mouth
    gap_lower: float
    drop: float  # how far the jaw is down
    chin: float  # y of the lowest point of the chin

    @classmethod
    def of(cls, parameters: FaceParameters) -> Features:
        """The features of somebody at a moment."""
        who, now = parameters.identity, parameters.scene
        smile, opened = now.smile, now.mouth_open
        grin = max(0.0, smile)
        drop = 0.15 * opened
        squint = 1 - 0.22 * grin
        base = -0.44 * who.nose_length
        mouth = base - 0.205 * who.length
        return cls(
            eye_x=0.315 * who.eye_gap * who.width,
            eye_half=0.16 * who.eye_width,
            eye_upper=0.07 * who.eye_height * now.eye_open * squint,
            eye_lower=0.034 * who.eye_height * (0.4 + 0.6 * min(1.0, now.eye_open)) * squint,
            eye_tilt=0.022 * who.eye_tilt,
            brow_y=0.165 * who.brow_height + 0.03 + 0.028 * now.brow_raise,
            brow_arch=0.03 + 0.045 * who.brow_arch + 0.01 * now.brow_raise,
            brow_thick=0.027 * who.brow_thickness,
            brow_inner=0.115 * who.eye_gap,
            brow_outer=0.53 * who.eye_gap * who.width,
            nose_half=0.158 * who.nose_width * (1 + 0.06 * grin),
            nose_base=base,
            nose_tip=base + 0.085,
            mouth_y=mouth,
            mouth_half=0.255 * who.mouth_width * (1 + 0.2 * grin - 0.1 * opened),
            smile=smile,
            lip_upper=0.056 * who.lip_upper * (1 - 0.25 * grin),
            lip_lower=0.075 * who.lip_lower * (1 - 0.2 * grin),
            gap_upper=0.008 * opened + 0.018 * grin * min(1.0, 4 * opened),
            gap_lower=0.13 * opened + 0.02 * grin * min(1.0, 4 * opened),
            drop=drop,
            chin=base + (CHIN + 0.44) * who.length - drop,
        )

    def lids(self, a: Floats) -> tuple[Floats, Floats]:
        """Upper and lower lid over the line between the corners, at −1 ≤ a ≤ 1; 0 beyond."""
        b = np.clip(a, -1, 1)
        arc = 1 - b * b
        tilt = self.eye_tilt * b
        upper = self.eye_upper * arc**0.75 * (1 - 0.13 * b) + tilt
        lower = -self.eye_lower * arc**0.85 * (1 + 0.2 * b) + tilt
        return upper, lower

    def brow(self, a: Floats) -> tuple[Floats, Floats]:
        """Middle line (y) and half thickness of a brow."""
        b = np.clip(a, -1, 1)
        arch = self.brow_arch * (1 - ((b - 0.25) / 1.25) ** 2)
        return self.brow_y + arch - 0.035, 0.004 + self.brow_thick * (0.62 + 0.38 * np.cos(1.9 * (b + 0.45)))

    def lips(self, a: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """y of the upper lip's outer and inner and the lower lip's inner and outer edge."""
        b = np.clip(np.abs(a), 0, 1)
        arc = 1 - b * b
        line = self.mouth_y + 0.085 * self.smile * (b * b - 0.35) - 0.012 * np.cos(3.1 * b) * arc
        upper_in = line + self.gap_upper * arc
        lower_in = line - self.gap_lower * arc**0.8
        bow = 1 - 0.3 * np.exp(-((b / 0.13) ** 2)) + 0.12 * np.exp(-(((b - 0.26) / 0.14) ** 2))
        upper_out = upper_in + self.lip_upper * (1 - b**1.7) ** 0.95 * bow
        lower_out = lower_in - self.lip_lower * arc**0.75
        return upper_out, upper_in, lower_in, lower_out

    def nose_width(self, y: Floats) -> Floats:
        """Half the width of the nose's region at height y; negative above and below it."""
        base, half = self.nose_base, self.nose_half
        heights = (base - 0.055, base - 0.03, base + 0.01, base + 0.06, base + 0.12, base + 0.26, 0.04, 0.08)
        widths = (-0.02, half * 0.55, half * 0.9, half, half * 0.84, half * 0.56, half * 0.38, -0.02)
        return np.interp(y, heights, widths).astype(np.float32)

    def frontal_landmarks(self) -> NDArray[np.float64]:
        """x and y of landmarks 17–67 (all but the jaw), [51, 2], seen from the front."""
        points: list[tuple[float, float]] = []
        brow_a = np.linspace(-0.92, 0.92, 5)
        centre, half = (self.brow_inner + self.brow_outer) / 2, (self.brow_outer - self.brow_inner) / 2
        line = self.brow(brow_a)[0]
        points += [(-(centre + half * a), y) for a, y in zip(brow_a[::-1], line[::-1], strict=True)]
        points += [(centre + half * a, y) for a, y in zip(brow_a, line, strict=True)]
        points += [(0, float(y)) for y in np.linspace(0.03, self.nose_tip, 4)]
        foot = self.nose_base
        wing = self.nose_half * 0.8
        points += [(-wing, foot), (-wing / 2, foot - 0.018), (0, foot - 0.028), (wing / 2, foot - 0.018), (wing, foot)]
        lid = np.array([-1, -0.36, 0.36, 1])
        upper, lower = self.lids(lid)
        outward = [(lid[i], upper[i]) for i in range(4)] + [(lid[2], lower[2]), (lid[1], lower[1])]
        eye = [(self.eye_x + self.eye_half * a, y) for a, y in outward]
        inward = [eye[3], eye[2], eye[1], eye[0], eye[5], eye[4]]
        points += [(-x, y) for x, y in inward] + eye
        a = np.array([-1, -0.62, -0.24, 0, 0.24, 0.62, 1])
        upper_out, _, _, lower_out = self.lips(a)
        points += [(self.mouth_half * a[i], upper_out[i]) for i in range(7)]
        points += [(self.mouth_half * a[i], lower_out[i]) for i in range(5, 0, -1)]
        b = np.array([-0.88, -0.36, 0, 0.36, 0.88])
        _, upper_in, lower_in, _ = self.lips(b)
        points += [(self.mouth_half * b[i], upper_in[i]) for i in range(5)]
        points += [(self.mouth_half * b[i], lower_in[i]) for i in range(3, 0, -1)]
        return np.array(points, np.float64)
