"""What does not exist is answered by what does, on every verb, with exit status 2."""

import pytest

from .commands import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--shape", "huge"], "there is no shape huge; there are: cpu-1024"),
        (["layer", "--peers", "hydra"], "there is no peer 'hydra'; there are: 'frozen linear', "),
        (["layer", "--dtype", "int8"], "there is no int8; there are: float32, bfloat16, float16"),
        (["layer", "--checkout", "/nowhere"], "checkout must be a folder, got /nowhere"),
        (["layer", "--rounds", "1"], "rounds must be at least 2, got 1"),
        (["kernels", "--seconds", "0"], "seconds must be positive, got 0.0"),
        (["kernels", "--dtype", "int8"], "there is no int8; there are: float32, bfloat16, float16"),
        (["memory", "--dtype", "int8"], "there is no int8; there are: float32"),
        (["scaling", "--sweep", "X"], "there is no sweep X; there are: T, E, R, K, dtype"),
        (["training", "--size", "huge"], "there is no size huge; there are: toy, small"),
        (["training", "--targets", "k"], "there are no targets k; there are: all, qv"),
        (["report", "/nowhere.json"], "/nowhere.json cannot be read as JSON"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(arguments, message, monkeypatch, capsys):
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_verb_lists_the_verbs(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "everything")
    said = capsys.readouterr().err
    for verb in ("kernels", "layer", "training", "memory", "scaling", "roofline", "gpu", "report", "bench"):
        assert f"'{verb}'" in said
