"""What a face is drawn from: a person (`Identity`) and one picture of that person (`Scene`).

All lengths are in head units: the head is about 1.5 wide and 2.3 high, its origin lies between the eyes inside the
skull, x points to the image's right, y up, z to the viewer. Proportions are those of drawing books: eyes at half
height, five eye widths across, thirds from hairline to brow, nose base and chin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HAIR_STYLES = ("bald", "buzz", "short", "side", "fringe", "curly", "afro", "bob", "long", "receding", "tied")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square", "sun")
HATS = ("none", "beanie", "cap", "brim")
BACKDROPS = ("gradient", "blobs", "panels", "foliage")

# sRGB anchors; hair from black to white, irises from dark brown to grey.
HAIR_COLOURS = ((22, 18, 17), (38, 27, 22), (66, 43, 29), (104, 70, 44), (148, 108, 66), (186, 148, 98), (134, 58, 30))
GREY_HAIR = (172, 170, 168)
IRIS_COLOURS = (
    (48, 28, 18),
    (74, 45, 24),
    (112, 80, 42),
    (98, 110, 62),
    (84, 118, 138),
    (110, 134, 150),
    (70, 92, 128),
)

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Identity:
    """A person: what stays the same from picture to picture. Scales are around 1, the rest says its own range."""

    person: int
    masculine: float  # 0–1: brow ridge, jaw, neck, brow thickness
    age: float  # 0–1: young adult to old
    melanin: float  # 0–1: the whole range of human skin
    redness: float  # 0–1
    freckles: float  # 0–1
    width: float  # of the head
    jaw: float  # width at the jaw's angle
    chin: float  # width of the chin
    length: float  # from the nose down
    cheek: float  # prominence of the cheekbones
    eye_gap: float
    eye_width: float
    eye_height: float
    eye_tilt: float  # −1–1, outer corner down to up
    hooded: float  # 0–1: how much of the upper lid the fold hides
    brow_height: float
    brow_arch: float  # 0–1
    brow_thickness: float
    nose_width: float
    nose_length: float
    nose_bridge: float  # height of the bridge
    nose_tip: float
    mouth_width: float
    lip_upper: float
    lip_lower: float
    ear: float
    iris: Colour  # sRGB, 0–1
    hair_colour: Colour  # sRGB, 0–1
    hair_style: str  # of HAIR_STYLES
    hair_volume: float
    hair_length: float  # 0–1, for bob and long
    hairline: float  # −1–1, low to high
    part: float  # −1–1, where the hair parts
    wave: float  # 0–1
    beard: str  # of BEARDS
    makeup: float  # 0–1: lip colour and lashes
    glasses: str  # of GLASSES: what this person wears when wearing any
    texture: int  # seed of skin and hair texture


@dataclass(frozen=True)
class Scene:
    """One picture: pose, expression, light, what is worn, background, camera."""

    yaw: float  # degrees, positive turns the face to the image's right
    pitch: float  # degrees, positive looks up
    roll: float  # degrees, positive tilts anticlockwise
    scale: float  # of a head unit, as a share of the image's side
    centre: tuple[float, float]  # of the head's origin, as shares of the image's side, from the upper left
    smile: float  # −0.4–1
    mouth_open: float  # 0–1
    eye_open: float  # 0–1.2
    brow_raise: float  # −1–1
    gaze: tuple[float, float]  # −1–1, right and up
    light: tuple[float, float]  # azimuth and elevation in degrees
    light_power: float
    light_colour: Colour
    ambient: float
    ambient_colour: Colour
    glasses: str
    hat: str
    hat_colour: Colour
    earrings: bool
    necklace: bool
    metal: Colour
    cloth_colour: Colour
    collar: str  # "round", "v" or "high"
    backdrop: str  # of BACKDROPS
    backdrop_colours: tuple[Colour, Colour, Colour]
    exposure: float
    blur: float  # sigma, as a share of the image's side
    noise: float  # of the full range
    texture: int  # seed of background and camera noise


@dataclass(frozen=True)
class FaceParameters:
    """Everything `draw` needs to know."""

    identity: Identity
    scene: Scene


def _rgb(colour: object) -> Colour:
    r, g, b = np.clip(np.asarray(colour, dtype=np.float64), 0, 1).tolist()
    return (r, g, b)


def _any_colour(rng: np.random.Generator, low: float = 0.05, high: float = 0.95, vivid: float = 0.5) -> Colour:
    grey = rng.uniform(low, high)
    return _rgb(grey + vivid * rng.uniform(-0.5, 0.5, 3) * (0.4 + grey))


def sample_identity(seed: int, person: int) -> Identity:
    """The person number `person` of the world `seed`."""
    rng = np.random.default_rng([seed, 1, person])

    def scale(spread: float) -> float:
        return float(np.clip(rng.normal(1, spread), 1 - 2.2 * spread, 1 + 2.2 * spread))

    def share() -> float:
        return float(rng.uniform())

    masculine = float(np.clip(rng.choice([0.15, 0.85]) + rng.normal(0, 0.12), 0, 1))
    man = masculine > 0.5
    age = float(rng.beta(1.3, 2.2))
    melanin = share()
    # Fair hair and light irises go with fair skin; the tail on either side stays possible.
    darkness = np.clip(melanin * 1.25 + rng.normal(0, 0.22), 0, 1)
    at = (1 - darkness) ** 0.8 * (len(HAIR_COLOURS) - 2)
    natural = np.array(HAIR_COLOURS[6 if rng.uniform() < 0.07 * (1 - melanin) * 2 else round(at)]) / 255.0
    grey = np.clip((age - 0.5) * 2.2 + rng.normal(0, 0.18), 0, 1)
    hair_colour = natural * (1 - grey) + grey * np.array(GREY_HAIR) / 255
    iris_at = (1 - np.clip(melanin * 1.5 + rng.normal(0, 0.25), 0, 1)) * (len(IRIS_COLOURS) - 1)
    if man:
        weights = (0.09, 0.13, 0.25, 0.13, 0.05, 0.1, 0.05, 0.01, 0.03, 0.14 if age > 0.35 else 0.02, 0.02)
    else:
        weights = (0.005, 0.015, 0.06, 0.07, 0.09, 0.1, 0.06, 0.2, 0.3, 0.0, 0.1)
    style = HAIR_STYLES[int(rng.choice(len(HAIR_STYLES), p=np.array(weights) / sum(weights)))]
    if style == "afro" and melanin < 0.45:
        style = "curly"
    beard_weights = (0.42, 0.2, 0.1, 0.1, 0.18) if man else (1, 0, 0, 0, 0)
    return Identity(
        person=person,
        masculine=masculine,
        age=age,
        melanin=melanin,
        redness=share(),
        freckles=float(max(0, rng.normal(-0.6, 0.7)) * (1 - melanin)),
        width=scale(0.045),
        jaw=scale(0.07) * (0.94 + 0.1 * masculine),
        chin=scale(0.12) * (0.88 + 0.22 * masculine),
        length=scale(0.035) * (0.98 + 0.04 * masculine),
        cheek=scale(0.3),
        eye_gap=scale(0.045),
        eye_width=scale(0.06),
        eye_height=scale(0.13) * (1.06 - 0.12 * masculine),
        eye_tilt=float(np.clip(rng.normal(0.15, 0.4), -1, 1)),
        hooded=share(),
        brow_height=scale(0.12) * (1.08 - 0.16 * masculine),
        brow_arch=share(),
        brow_thickness=scale(0.2) * (0.72 + 0.5 * masculine),
        nose_width=scale(0.1) * (0.88 + 0.12 * masculine + 0.22 * melanin),
        nose_length=scale(0.05),
        nose_bridge=scale(0.2) * (1.1 - 0.35 * melanin),
        nose_tip=scale(0.22),
        mouth_width=scale(0.07),
        lip_upper=scale(0.2) * (0.85 + 0.5 * melanin) * (1.1 - 0.25 * masculine),
        lip_lower=scale(0.16) * (0.9 + 0.35 * melanin) * (1.08 - 0.2 * masculine),
        ear=scale(0.1),
        iris=_rgb(np.array(IRIS_COLOURS[round(iris_at)]) / 255.0),
        hair_colour=_rgb(hair_colour * rng.uniform(0.85, 1.15)),
        hair_style=style,
        hair_volume=scale(0.2),
        hair_length=share(),
        hairline=float(np.clip(rng.normal(0, 0.4), -1, 1)),
        part=float(rng.uniform(-1, 1)),
        wave=share() ** 1.5,
        beard=BEARDS[int(rng.choice(len(BEARDS), p=beard_weights))],
        makeup=0.0 if man else float(rng.uniform() ** 1.3),
        glasses=GLASSES[int(rng.choice(len(GLASSES), p=(0.68, 0.11, 0.15, 0.06)))],
        texture=int(rng.integers(1 << 31)),
    )


def sample_scene(seed: int, index: int, identity: Identity) -> Scene:
    """The picture number `index`, of somebody who owns those glasses and wears jewels or not."""
    rng = np.random.default_rng([seed, 2, index])
    warm = rng.normal(0, 1)
    pose_spread = rng.choice([0.45, 1.0])
    expression = rng.uniform()
    smile = rng.uniform(-0.4, 0.2) if expression < 0.45 else rng.uniform(0.2, 1.0)
    mouth = 0.0 if rng.uniform() < 0.6 else rng.uniform() ** 1.4
    return Scene(
        yaw=float(np.clip(rng.normal(0, 20) * pose_spread, -40, 40)),
        pitch=float(np.clip(rng.normal(0, 9) * pose_spread, -20, 20)),
        roll=float(np.clip(rng.normal(0, 8) * pose_spread, -25, 25)),
        scale=float(rng.uniform(0.27, 0.335)),
        centre=(float(np.clip(rng.normal(0.5, 0.02), 0.45, 0.55)), float(np.clip(rng.normal(0.49, 0.02), 0.44, 0.54))),
        smile=float(smile),
        mouth_open=float(mouth),
        eye_open=float(0.08 if rng.uniform() < 0.025 else np.clip(rng.normal(0.95, 0.1), 0.55, 1.2)),
        brow_raise=float(np.clip(rng.normal(0, 0.4), -1, 1)),
        gaze=(float(np.clip(rng.normal(0, 0.3), -1, 1)), float(np.clip(rng.normal(0, 0.2), -0.7, 0.7))),
        light=(float(np.clip(rng.normal(0, 38), -80, 80)), float(rng.uniform(8, 62))),
        light_power=float(rng.uniform(0.75, 1.15)),
        light_colour=_rgb(np.array([1.0, 0.955, 0.9]) + np.array([0.0, -0.025, -0.06]) * warm),
        ambient=float(rng.uniform(0.28, 0.6)),
        ambient_colour=_rgb(np.array([0.9, 0.93, 0.97]) + rng.normal(0, 0.05, 3)),
        glasses=identity.glasses if rng.uniform() < 0.8 else "none",
        hat=HATS[int(rng.choice(len(HATS), p=(0.9, 0.04, 0.03, 0.03)))],
        hat_colour=_any_colour(rng),
        earrings=bool(rng.uniform() < 0.5 * (identity.masculine < 0.5)),
        necklace=bool(rng.uniform() < (0.3 if identity.masculine < 0.5 else 0.05)),
        metal=((0.83, 0.66, 0.32), (0.75, 0.76, 0.78))[int(rng.integers(2))],
        cloth_colour=_any_colour(rng, vivid=0.5),
        collar=("round", "v", "high")[int(rng.choice(3, p=(0.45, 0.35, 0.2)))],
        backdrop=BACKDROPS[int(rng.choice(len(BACKDROPS), p=(0.25, 0.35, 0.25, 0.15)))],
        backdrop_colours=tuple(_any_colour(rng, vivid=0.3) for _ in range(3)),  # type: ignore[arg-type]
        exposure=float(rng.uniform(0.8, 1.06)),
        blur=float(rng.choice([0.0, 0.0012, 0.003], p=[0.6, 0.3, 0.1])),
        noise=float(rng.uniform(0.001, 0.011)),
        texture=int(rng.integers(1 << 31)),
    )


def sample(seed: int, index: int = 0, *, person: int | None = None, images_per_person: int = 4) -> FaceParameters:
    """Parameters of face `index` of the world `seed`: a pure function of its arguments.

    `person` says who it is; by default each person has `images_per_person` pictures in a row.
    """
    identity = sample_identity(seed, index // images_per_person if person is None else person)
    return FaceParameters(identity, sample_scene(seed, index, identity))
