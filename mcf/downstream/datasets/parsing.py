"""Sets of faces with a class for every pixel: LaPa, CelebAMask-HQ as they are published, and any images with masks."""

from __future__ import annotations

from pathlib import Path

from mcf.downstream.datasets.faceset import Face, FaceSet, count_note, need, table_points
from mcf.errors import UserError

LAPA = ("background", "face", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "u_lip", "inner_mouth", "l_lip", "hair")
LAPA_ALIGN = [104, 105, 54, 84, 90]  # pupils, tip of the nose, corners of the mouth
# In the order in which the files are laid over each other.
CELEBAMASK_PARTS = (
    "neck", "skin", "cloth", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye", "nose", "mouth", "l_lip", "u_lip",
    "hair", "eye_g", "hat", "ear_r", "neck_l",
)  # fmt: skip
# The usual 19 classes of masks that are stored as one picture.
CELEBAMASK_CLASSES = (
    "background", "skin", "nose", "glasses", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip",
    "l_lip", "hair", "hat", "earring", "necklace", "neck", "cloth",
)  # fmt: skip
CLASSES_FILE = "classes.txt"
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEST_FOLDERS = ("test", "dev")


def lapa(root: Path) -> FaceSet:
    """LaPa: {train,val,test}/{images,labels,landmarks}; its validation split is left aside."""
    need(
        root, "lapa", *(f"{split}/{part}/" for split in ("train", "test") for part in ("images", "labels", "landmarks"))
    )
    train, test = (_lapa_split(root / split) for split in ("train", "test"))
    return FaceSet(
        "lapa", "parsing", train, test, crop="similarity", warp=0.8, epochs=300, classes=LAPA,
        notes=count_note("LaPa", train, test, 18_168, 2_000),
    )  # fmt: skip


def _lapa_split(folder: Path) -> list[Face]:
    faces = []
    for stem in _pairs(folder / "images", folder / "labels"):
        landmarks = folder / "landmarks" / f"{stem}.txt"
        if not landmarks.is_file():
            raise UserError(
                f"{landmarks}: no such file, but there is an image for it; fetch it, or take the image away"
            )
        count, *values = landmarks.read_text().split() or ["0"]
        if count != "106" or len(values) != 2 * 106:
            raise UserError(f"{landmarks}: {len(values) // 2} points, headed {count!r}; expected 106")
        points = table_points(values, str(landmarks))
        faces.append(
            Face(stem, folder / f"images/{stem}.jpg", labels=folder / f"labels/{stem}.png", align=points[LAPA_ALIGN])
        )
    return faces


def celebamask_hq(root: Path) -> FaceSet:
    """CelebAMask-HQ: images at 512, parts merged, the split by CelebA's own; its validation split is left aside."""
    mapping, partition = "CelebA-HQ-to-CelebA-mapping.txt", "list_eval_partition.txt"
    need(root, "celebamask_hq", "CelebA-HQ-img/", "CelebAMask-HQ-mask-anno/", mapping, partition)
    number = {row[2]: int(row[0]) for row in _rows(root / mapping, 3)}
    groups: dict[int, list[Face]] = {0: [], 1: [], 2: []}
    for file, group in _rows(root / partition, 2):
        if file not in number:
            continue
        index = number[file]
        folder = root / "CelebAMask-HQ-mask-anno" / str(index // 2000)
        named = ((folder / f"{index:05d}_{part}.png", value) for value, part in enumerate(CELEBAMASK_PARTS, 1))
        parts = tuple((path, value) for path, value in named if path.is_file())
        if not parts:
            raise UserError(f"{folder}: no mask {index:05d}_*.png for the image {index}.jpg; fetch it, or take it away")
        groups[int(group)].append(Face(str(index), root / f"CelebA-HQ-img/{index}.jpg", parts=parts, side=512))
    return FaceSet(
        "celebamask_hq", "parsing", groups[0], groups[2], crop="whole", epochs=300,
        classes=("background", *CELEBAMASK_PARTS), notes=count_note("CelebAMask-HQ", groups[0], groups[2], 24_183, 2_824),
    )  # fmt: skip


def _rows(path: Path, columns: int) -> list[list[str]]:
    """Lines about images of a table with blanks between its columns; its headings speak of no .jpg."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if ".jpg" not in line:
            continue
        row = line.split()
        if len(row) != columns or not row[0 if columns == 3 else 1].isdecimal():
            raise UserError(f"{path}:{number}: {line!r} is no line of {columns} columns; fetch the file again")
        rows.append(row)
    return rows


def masks(root: Path) -> FaceSet:
    """Any images with masks: {train,test}/{images,masks} (dev instead of test will do), masks as PNG of class numbers.

    The names of the classes, background first, are the lines of classes.txt; without it they are CelebAMask-HQ's 19.
    """
    need(root, "masks", "train/images/", "train/masks/")
    second = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if second is None:
        raise UserError(f"data={root}: no {'/ or '.join(TEST_FOLDERS)}/; dataset=masks expects train/ and one of them")
    need(root, "masks", f"{second}/images/", f"{second}/masks/")
    train, test = (folder_of_masks(root / split) for split in ("train", second))
    return of_masks("masks", train, test, _class_names(root))


def of_masks(name: str, train: list[Face], test: list[Face], classes: tuple[str, ...]) -> FaceSet:
    """A set of parsing without a protocol of its own."""
    return FaceSet(name, "parsing", train, test, crop="whole", epochs=300, classes=classes)


def folder_of_masks(folder: Path) -> list[Face]:
    """The faces of FOLDER/images and FOLDER/masks, by their names."""
    stems = _pairs(folder / "images", folder / "masks")
    return [Face(stem, image, labels=folder / f"masks/{stem}.png") for stem, image in stems.items()]


def _class_names(root: Path) -> tuple[str, ...]:
    file = root / CLASSES_FILE
    if not file.is_file():
        return CELEBAMASK_CLASSES
    names = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not 2 <= len(names) <= 256 or len(set(names)) < len(names):
        raise UserError(f"{file}: {len(names)} names; expected 2 to 256 different ones, one a line, background first")
    return names


def _pairs(images: Path, labels: Path) -> dict[str, Path]:
    """Images by stem; UserError for an image without a mask, or a mask without an image."""
    found = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGES}
    masked = {path.stem for path in labels.iterdir() if path.suffix.lower() == ".png"}
    for missing, there, where in ((found.keys() - masked, images, labels), (masked - found.keys(), labels, images)):
        if missing:
            what = "mask" if where is labels else "image"
            raise UserError(
                f"{there}: {len(missing)} of its files have no {what} in {where} (for example {min(missing)}); "
                "add what is missing, or take the others away"
            )
    return found
