"""How fast the operations are, once they are shown to be right: `python -m mcf.kernels.bench`.

registry ──► gate (each implementation against the float64 reference) ──► timing ──► table, plots

tune searches the configurations of `mcf.kernels.tuning` on the GPU at hand.
"""
