"""What others see of a mixture's dropout: an nn.Dropout for each of its rates.

The masks fall on elements of A (and of B, of x, of z) inside the operator, so no module is called for them. But whoever
walks a model's modules governs dropout by them: flags are saved and set module by module, and `p` is set to 0 on every
nn.Dropout. So the rate and the flag are read from here, in every forward.
"""

from torch import nn

from ..mixture.spec import Mixture

RATES = ("dropout", "up_dropout", "input_dropout", "hidden_dropout")  # in the order of the operator's Dropout
MASK_RATES = RATES[:2]  # of weights: their masks are functions of a seed


class MaskDropout(nn.Dropout):
    """One rate of a mixture, on while `training` is set. The mixture reads both; calling it drops elements of x."""


def mask_dropouts(mixture: Mixture) -> nn.ModuleDict:
    """Field of the mixture -> MaskDropout, for the rates that are not 0."""
    made = nn.ModuleDict()
    for name in RATES:
        rate = getattr(mixture, name)
        if rate:
            made[name] = MaskDropout(rate)
    return made
