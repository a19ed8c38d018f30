"""Compiled peers of the benchmarks are compiled for the sizes of each table, not for any size since one came before."""

import pytest
import torch

from benchmarks.cpu import memory, training
from benchmarks.peers import compare
from benchmarks.peers.known import PEERS, choose, mosld_layer
from benchmarks.timing.shapes import LAYERS, LayerShape
from benchmarks.timing.timers import Budget

SHAPES = {"first": LayerShape(16, 8, 12, 2, 4, 2), "second": LayerShape(24, 10, 6, 2, 4, 2)}
TWICE = Budget(2, 60.0, 2)


def layers(tmp_path):
    for shape in SHAPES.values():
        compare.compare(choose(("noted",)), shape, torch.float32, TWICE)


def kept_bytes(tmp_path):
    memory.measure_shapes(list(SHAPES), "float32", choose(("noted",)), tmp_path / "memory.json")


def models(tmp_path):
    training.measure_sizes(list(SHAPES), "qv", choose(("noted",)), TWICE, tmp_path / "training.json")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's, of its own inputs
@pytest.mark.parametrize("tables", [layers, kept_bytes, models])
def test_every_table_compiles_its_peers_for_its_own_sizes(tables, tmp_path, monkeypatch):
    graphs = []

    def noting(graph, inputs):
        numbers = [size for value in inputs for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
        if torch.is_grad_enabled():  # generation has two sizes of its own, the prompt and one token
            graphs.append(any(isinstance(number, torch.SymInt) for number in numbers))
        return graph

    def noted(linear, mixture):
        return torch.compile(mosld_layer(linear, mixture), fullgraph=True, backend=noting)

    monkeypatch.setitem(PEERS, "noted", noted)
    for i, (name, shape) in enumerate(SHAPES.items()):
        monkeypatch.setitem(LAYERS, name, shape)
        size = training.SIZES["toy"]
        sizes = dict(batch=size.batch + i, length=size.length + 2 * i, hidden=size.hidden + 8 * i)
        monkeypatch.setitem(training.SIZES, name, training.Size(**{**vars(size), **sizes}))
    tables(tmp_path)
    assert len(graphs) >= 2 and not any(graphs)
