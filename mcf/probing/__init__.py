"""Probes: what an encoder's features tell of faces without training it further (Chen et al. 2020; He et al. 2020).

faces.py     a folder of labelled faces → who, which video, which points; and squares for the encoder
numbers.py   features → nearest neighbours, linear probe, ridge regression, rank, uniformity
probe.py     one encoder over all ranks: each embeds a share of the faces, then each computes some of the numbers
"""
