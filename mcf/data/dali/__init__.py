"""The only door to DALI: whole images for training (`Decoder`), rectangles of them for packing (`RegionDecoder`)."""

from mcf.data.dali.decoder import Decoded, Decoder, Undecodable
from mcf.data.dali.library import import_dali
from mcf.data.dali.regions import RegionDecoder

__all__ = ["Decoded", "Decoder", "RegionDecoder", "Undecodable", "import_dali"]
