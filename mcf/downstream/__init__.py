"""Downstream tasks: how good an encoder is, by the protocol of FaRL (Zheng et al., CVPR 2022).

datasets/     files as they are published → faces with points, boxes or masks
warps.py      a face → the square that the network sees, and predictions back into the original image
augment.py    what training does to such squares
loader.py     decodes and warps, in an order that depends on (seed, sample) alone
network.py    ViT taps → pyramid → UPerNet head
alignment.py, parsing.py    losses, predictions, metrics of the two tasks
metrics.py    NME, AUC, FR, F1
pictures.py, charts.py      what a person looks at
"""
