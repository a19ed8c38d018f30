"""The merging methods by name, with their papers' settings.

method                    merged model                                        coefficients
task_arithmetic           theta_0 + lambda sum_k tau_k                        0.3 (arXiv 2212.04089)
ties                      theta_0 + lambda mean of the agreeing tau_k         1 (arXiv 2306.01708)
adamerging_task           theta_0 + sum_k lambda_k tau_k                      by the entropy, from 0.3 (arXiv 2310.02575)
adamerging_layer          the same, one lambda a task and layer               by the entropy, from 0.3
adamerging_task++, _layer++   the same on the vectors that TIES has trimmed and elected
concrete_task_arithmetic  theta_0 + lambda sum_k m * tau_k                    0.3; the mask m by the entropy (arXiv 2312.06173)
concrete_adamerging       the same                                            mask first, then layer-wise lambda
r_mtllmf                  theta_0 + lambda sum_k (tau_k + noise)              0.3; without embeddings (arXiv 2411.18220)
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """adaptive: whether unlabelled data decides something. factored: whether adapters can stay factored in it. scale: its
    coefficients at first. steps: in which these are trained, mask_steps: the mask before them."""

    title: str
    adaptive: bool = False
    by_layer: bool = False
    ties: bool = False
    masked: bool = False
    factored: bool = False
    scale: float = 0.3
    steps: int = 500
    mask_steps: int = 2000


METHODS = {
    "task_arithmetic": Method("Task arithmetic", factored=True),
    "ties": Method("TIES", ties=True, scale=1.0),
    "adamerging_task": Method("AdaMerging, task-wise", adaptive=True, factored=True),
    "adamerging_layer": Method("AdaMerging, layer-wise", adaptive=True, by_layer=True, factored=True),
    "adamerging_task++": Method("AdaMerging++, task-wise", adaptive=True, ties=True),
    "adamerging_layer++": Method("AdaMerging++, layer-wise", adaptive=True, by_layer=True, ties=True),
    "concrete_task_arithmetic": Method("Concrete task arithmetic", masked=True, adaptive=True),
    "concrete_adamerging": Method(
        "Concrete AdaMerging, layer-wise", masked=True, adaptive=True, by_layer=True, steps=1000, mask_steps=1000
    ),
    "r_mtllmf": Method("R-MTLLMF"),
}
WIRELESS = "r_mtllmf"
