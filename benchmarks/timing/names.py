"""Names that a user gives, checked against those that exist."""

from collections.abc import Collection, Iterable


def require_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """raises ValueError for names that are not among the known, listing those that are.

    kind: what the names are names of, such as "shape"; empty where the names speak for themselves.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        missing = f"{kind} {', '.join(unknown)}".strip()
        raise ValueError(f"there is no {missing}; there are: {', '.join(known)}")
