"""mcf: pre-training of face encoders by masked image modelling and contrastive learning (MCF, ACM MM 2023)."""

__version__ = "0.1.0.dev0"
