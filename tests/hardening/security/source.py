"""What no source file of the packages may do, found on its syntax tree."""

import ast

PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "os.execl", "os.execlp", "os.execvp", "os.spawnl", "subprocess.getoutput",
          "subprocess.getstatusoutput", "pty.spawn"}  # fmt: skip
PROGRAMS = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}
UNPICKLES = {"numpy.load", "np.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
LOADED_BY = {"torch.load", "torch_load"}


def faults(text: str) -> list[str]:
    """One sentence for each forbidden call or import, with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        for what in _of(node):
            found.append(f"line {node.lineno}: {what}")  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [f"imports {alias.name}" for alias in node.names if alias.name.partition(".")[0] in PICKLES]
    if isinstance(node, ast.ImportFrom) and node.module:
        module, names = node.module, [alias.name for alias in node.names]
        renamed = PROGRAMS | SHELLS | LOADED_BY | UNPICKLES | {"builtins.eval", "builtins.exec"}
        hidden = [name for name in names if f"{module}.{name}" in renamed]
        return [f"imports {module}"] * (module.partition(".")[0] in PICKLES) + [
            f"imports {name} by itself" for name in hidden
        ]
    return _of_call(node) if isinstance(node, ast.Call) else []


def _of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    found = []
    if name.removeprefix("builtins.") in RUNS_TEXT or name in SHELLS | UNPICKLES:
        found.append(f"calls {name}")
    if name in LOADED_BY and not _is(given.get("weights_only"), True):
        found.append(f"calls {name} without weights_only=True")
    if name in PROGRAMS and not (call.args and isinstance(call.args[0], ast.List)):
        found.append(f"calls {name} without a list of words")
    if "shell" in given and not _is(given["shell"], False):
        found.append("asks for a shell")
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        found.append("lets code in a model's folder run")
    if name.endswith("from_pretrained") and name.split(".")[0].startswith("Auto") and "trust_remote_code" not in given:
        found.append(f"calls {name} without trust_remote_code=False")  # without it transformers asks the terminal
    return found


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
