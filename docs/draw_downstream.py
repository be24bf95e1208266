"""docs/downstream.jpg: points and classes that two fine-tuned models find on drawn faces of people they never saw.

python docs/draw_downstream.py POINTS_RUN CLASSES_RUN FACES OUT.jpg       FACES: what mcf.data.faces drew
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mcf.downstream import saved
from mcf.downstream.datasets import open_faces
from mcf.downstream.inference import Predictor
from mcf.downstream.pictures import with_classes, with_points

COUNT, SIDE, GAP = 7, 190, 4


def main(points_run: str, classes_run: str, faces: str, out: str) -> None:
    test = open_faces("alignment", "faces", faces).test
    # One picture of each of some people, spread over the test set.
    people = {face.person: face for face in test}
    chosen = [list(people.values())[i] for i in np.linspace(0, len(people) - 1, COUNT).astype(int)]
    points, classes = (Predictor(*saved.load(run)) for run in (points_run, classes_run))
    sheet = Image.new("RGB", (COUNT * (SIDE + GAP) - GAP, 2 * (SIDE + GAP) - GAP), "white")
    for column, face in enumerate(chosen):
        # With nothing but the picture, as mcf.predict on pictures without boxes.
        image, found = points(face.image, looks=2)
        _, labels = classes(face.image)
        for row, drawn in enumerate((with_points(image, found), with_classes(image, labels))):
            tile = Image.fromarray(drawn).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * (SIDE + GAP), row * (SIDE + GAP)))
    sheet.save(Path(out), quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
