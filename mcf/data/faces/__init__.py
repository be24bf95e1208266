"""Generated faces: pictures drawn from parameters, with exact 68 landmarks and a 19-class mask for each.

They give every later part labelled data without a download. A face is a small ray-cast head (`head`, on `chart`),
painted (`paint`, `hair`, `body`) with curves that also give the landmarks and the mask (`features`), and developed
like a photograph (`render`). It is a pure function of (seed, index).

    python -m mcf.data.faces out=DIR count=600 size=256 seed=0
"""

from mcf.data.faces.paint import Label
from mcf.data.faces.parameters import FaceParameters, Identity, Scene, sample, sample_identity
from mcf.data.faces.render import Face, draw

__all__ = ["Face", "FaceParameters", "Identity", "Label", "Scene", "draw", "sample", "sample_identity"]
