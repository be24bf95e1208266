"""One training step against golden numbers of the reference: `python -m mcf.parity golden=DIR`.

    DIR/rank0.safetensors …  inputs, state before, everything the reference computed, state after (METHOD 3)
        ──► our network, momentum branch and objective with those weights, images and mask noise, in float32
        ──► a table of relative errors; status 1 if one is over the tolerance

The heads' BatchNorm divides by the spread over a handful of samples, and so multiplies the last bit of the sums before it:
some gradients of a golden step are not determined to 1e-5 by float32, and another processor, which adds in another order,
finds others. Where an error is over the tolerance, the step is therefore repeated with every weight moved by one unit in its
last place, up or down at random. What that moves in a number is what float32 leaves open in it, and no error.

Widths, depths and heads come from the file. As many `rankN.safetensors` as there are, so many processes run (gloo):
keys are gathered over ranks, gradients averaged, BatchNorm stays per rank.
"""
