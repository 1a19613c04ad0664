"""The documentation is complete: docs/api.md names everything public, and docstrings name every parameter."""

import inspect
import re
from pathlib import Path

import pytest

import jaxmech as jm
from jaxmech import checkpoint

API = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
MODULES = {"jm": jm, "jm.boxes": jm.boxes, "jm.dcm": jm.dcm, "jm.demo": jm.demo, "checkpoint": checkpoint}


def public_names(module) -> list[str]:
    """`__all__`, or else the functions and classes that the module itself defines."""
    own = [n for n, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", [n for n in own if not n.startswith("_") and callable(vars(module)[n])])
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


PUBLIC = {f"{prefix}.{name}": getattr(m, name) for prefix, m in MODULES.items() for name in public_names(m)}


def functions() -> dict[str, object]:
    """The public functions, and the public methods of public classes that this package defines."""
    found = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
    for name, x in PUBLIC.items():
        for method in vars(x) if inspect.isclass(x) else ():
            value = inspect.getattr_static(x, method)
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and not method.startswith("_") and value.__module__.startswith("jaxmech"):
                found[f"{name}.{method}"] = value
    return found


@pytest.mark.parametrize("name, function", functions().items(), ids=functions())
def test_a_docstring_names_every_parameter(name, function):
    """As an entry of Args, which may be one for several, or in backticks."""
    text = function.__doc__ or ""
    entries = re.findall(r"^ +(\w+(?:, \w+)*):", text.partition("Args:")[2], flags=re.MULTILINE)
    said = {word for entry in entries for word in entry.split(", ")} | set(re.findall(r"`(\w+)", text))
    missing = [p for p in inspect.signature(function).parameters if p not in ("self", "cls") and p not in said]
    assert text and not missing, f"{name} does not say what {', '.join(missing)} is"


def test_the_page_of_the_api_has_one_line_for_every_public_name_and_no_other():
    listed = re.findall(r"^\| `([\w.]+)", API, flags=re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)
