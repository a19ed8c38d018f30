"""Every planted fault, by the area it is in. A new one is an entry in its area's file."""

from tests.hardening.mutants.faults import (
    balance,
    dropout,
    export,
    gradients,
    layer,
    loading,
    merging,
    operator,
    routing,
    security,
    tasks,
    triton,
)

AREAS = {
    "operator": operator.FAULTS,
    "gradients": gradients.FAULTS,
    "triton": triton.FAULTS,
    "dropout": dropout.FAULTS,
    "routing": routing.FAULTS,
    "balance": balance.FAULTS,
    "layer": layer.FAULTS,
    "export": export.FAULTS,
    "loading": loading.FAULTS,
    "merging": merging.FAULTS,
    "tasks": tasks.FAULTS,
    "security": security.FAULTS,
}
