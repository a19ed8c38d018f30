"""The merging methods by name, with their papers' settings.

method                    arXiv       merged model                               coefficients
task_arithmetic           2212.04089  theta_0 + lambda sum_k tau_k               0.3
ties                      2306.01708  theta_0 + lambda mean of agreeing tau_k    1
adamerging_task           2310.02575  theta_0 + sum_k lambda_k tau_k             by the entropy, from 0.3
adamerging_layer                      the same, one lambda a task and layer      by the entropy, from 0.3
adamerging_task++, _layer++           the same on the vectors that TIES has trimmed and elected
concrete_task_arithmetic  2312.06173  theta_0 + lambda sum_k m * tau_k           0.3; the mask m by the entropy
concrete_adamerging                   the same                                   mask first, then layer-wise lambda
r_mtllmf                  2411.18220  theta_0 + lambda sum_k (tau_k + noise)     0.3; without embeddings
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method does.

    title: its name in tables. adaptive: whether unlabelled data decides something.
    by_layer: whether there is a coefficient for each task and layer, instead of each task.
    ties: whether TIES trims and elects the vectors first. masked: whether a Concrete mask is trained.
    factored: whether adapters can stay factored in it.
    scale: the coefficients before the first step. steps: of their training. mask_steps: of the mask's, before that.
    """

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
