"""The one place that knows DeepSpeed.

engine.py      the optimiser step over all ranks, and its state in a layout that knows no ranks
stages.py      what differs between the ZeRO stages
reduction.py   gradients averaged beside the backward pass, under stage 0
library.py     DeepSpeed, imported and configured
"""

from mcf.engine.engine import Engine, StepResult, parameter_groups

__all__ = ["Engine", "StepResult", "parameter_groups"]
