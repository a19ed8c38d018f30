"""What mosld takes from PEFT beside its documented names stands in one file, and the installed PEFT has all of it."""

import ast
import inspect
import re
from pathlib import Path

import peft
import pytest
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from mosld.tuner import peft_api

ROOT = Path(__file__).parents[2]
PEFT_API = ROOT / "mosld" / "tuner" / "peft_api.py"
# The classes that PEFT's documentation describes, which its __init__ does not list.
DOCUMENTED = {"peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"}}


def undocumented_imports(source: str) -> list[str]:
    """What `source` imports from PEFT that PEFT does not document, as module and name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            found += [module for module in modules if module.startswith("peft.")]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == "peft":
            allowed = set(peft.__all__) if node.module == "peft" else DOCUMENTED.get(node.module or "", set())
            names = [alias.name for alias in node.names]
            found += [f"{node.module}.{name}" for name in names if name not in allowed]
    return found


def listed_names() -> set[str]:
    return {name for table in (peft_api.CALLED, peft_api.OVERRIDDEN) for methods in table.values() for name in methods}


def private_names_of_peft() -> set[str]:
    """Names with an underscore of the classes that mosld extends or calls, without what torch and Python give them."""
    names = listed_names() | {"_adapters"}  # set by AuxiliaryTrainingWrapper.__init__
    for owner in {*peft_api.CALLED, *peft_api.OVERRIDDEN}:
        names |= set(dir(owner))
    others = set(dir(nn.Module)) | {"_abc_impl"}
    return {name for name in names - others if name.startswith("_") and not name.startswith("__")}


def private_uses(source: str, private: set[str]) -> list[str]:
    """The names among `private` that `source` reads from an object or defines as a method."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private:
            found.append(node.attr)
        elif isinstance(node, ast.ClassDef):
            methods = [own.name for own in node.body if isinstance(own, ast.FunctionDef)]
            found += [name for name in methods if name in private]
    return found


def listed(table: peft_api.Methods) -> list:
    return [
        pytest.param(owner, name, parameters, id=f"{owner.__name__}.{name}")
        for owner, methods in table.items()
        for name, parameters in methods.items()
    ]


def files_of_mosld() -> list[Path]:
    files = [path for path in (ROOT / "mosld").rglob("*.py") if path != PEFT_API]
    assert len(files) > 50
    return files


def test_nothing_else_imports_what_peft_does_not_document():
    for path in files_of_mosld():
        assert undocumented_imports(path.read_text()) == [], path


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("from peft.utils.other import get_pattern_key", "peft.utils.other.get_pattern_key"),
        ("from peft.tuners.tuners_utils import _get_in_out_features", "peft.tuners.tuners_utils._get_in_out_features"),
        ("def f():\n    from peft import mapping", "peft.mapping"),
        ("import peft.utils.other as other", "peft.utils.other"),
    ],
)
def test_a_planted_import_is_found(planted, found):
    source = (ROOT / "mosld" / "tuner" / "model.py").read_text()
    assert undocumented_imports(f"{source}\n{planted}\n") == [found]


def test_documented_imports_are_none_of_them():
    source = "import peft\nfrom peft import LoraConfig\nfrom peft.tuners.tuners_utils import BaseTunerLayer\n"
    assert undocumented_imports(source) == []


def test_every_private_name_of_peft_that_is_used_is_listed():
    private, used = private_names_of_peft(), set()
    for path in files_of_mosld():
        used |= set(private_uses(path.read_text(), private))
    assert used == {name for name in listed_names() if name.startswith("_")}


def test_a_planted_private_use_is_found():
    private = private_names_of_peft()
    assert private_uses("def f(wrapper):\n    return wrapper._adapters\n", private) == ["_adapters"]
    planted = "class Tuner:\n    def _inject_parameters(self):\n        self._unlisted()\n"
    assert private_uses(planted, private) == ["_inject_parameters"]


@pytest.mark.parametrize(("owner", "name", "parameters"), [*listed(peft_api.CALLED), *listed(peft_api.OVERRIDDEN)])
def test_the_installed_peft_has_the_method_with_these_parameters(owner, name, parameters):
    if Version(peft.__version__) < Version(peft_api.SINCE.get(name, peft_api.SEEN[0])):
        pytest.skip(f"PEFT {peft.__version__} has no {name} yet")
    hint = f"mosld/tuner/peft_api.py lists {owner.__name__}.{name}, which peft {peft.__version__}"
    assert hasattr(owner, name), f"{hint} does not have"
    function = inspect.unwrap(getattr(inspect.getattr_static(owner, name), "__func__", getattr(owner, name)))
    # self and cls come by themselves.
    names = [parameter for parameter in parameters if parameter not in ("self", "cls")]
    own = [parameter for parameter in inspect.signature(function).parameters if parameter not in ("self", "cls")]
    assert own[: len(names)] == names, f"{hint} has with other parameters"


@pytest.mark.parametrize("function", peft_api.FUNCTIONS, ids=lambda function: function.__name__)
def test_the_installed_peft_has_the_function_with_these_parameters(function):
    parameters = peft_api.FUNCTIONS[function]
    assert tuple(inspect.signature(function).parameters)[: len(parameters)] == parameters


def test_the_methods_of_mosld_replace_the_listed_ones():
    from mosld.tuner.config import MoSLDConfig
    from mosld.tuner.layer import MoSLDLayer, MoSLDPeftBlock
    from mosld.tuner.model import MoSLDModel

    ours = {"BaseTuner": (MoSLDModel,), "PeftModel": (MoSLDModel,), "PeftConfigMixin": (MoSLDConfig,)}
    for owner, methods in peft_api.OVERRIDDEN.items():
        if owner is peft.PeftModel:
            wrapped = {name for name in methods if hasattr(getattr(owner, name), "_mosld_guards")}
            assert wrapped == {"load_adapter", "save_pretrained"}
            methods = methods.keys() - wrapped
        classes = ours.get(owner.__name__, (MoSLDLayer, MoSLDPeftBlock))
        for name in methods:
            assert any(name in vars(cls) for cls in classes), f"{owner.__name__}.{name} is not overridden"
    assert issubclass(MoSLDModel, BaseTuner) and issubclass(MoSLDLayer, BaseTunerLayer)


def test_peft_builds_the_listed_expressions_and_arguments():
    tuners_utils, other, model = (
        Path(inspect.getfile(part)).read_text()
        for part in (BaseTuner, peft_api.AuxiliaryTrainingWrapper, peft.PeftModel)
    )
    for source, pattern, entry in (
        (tuners_utils, peft_api.MODULES_TO_SAVE_PATTERN, "{m}"),
        (tuners_utils, peft_api.LAYERS_PATTERN, "{pattern}"),
        (other, peft_api.NUM_EXPERTS_PATTERN, "{key}"),
    ):
        assert pattern.replace("{}", entry) in source, pattern
    assert f"save_pretrained(output_dir, {peft_api.SAVED_BY_PEFT_MODEL}=" in model


def test_a_wrapper_tells_its_adapters():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    wrappers = [module for module in model.modules() if isinstance(module, peft_api.AuxiliaryTrainingWrapper)]
    assert [peft_api.adapters_of_wrapper(wrapper) for wrapper in wrappers] == [{"default"}]


def test_the_range_of_versions_is_that_of_the_project():
    oldest, newest = peft_api.SEEN
    required = re.search(r'"peft>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^peft==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert required and Version(required[1]) == Version(oldest)
    assert pinned and Version(pinned[1]) == Version(newest)
