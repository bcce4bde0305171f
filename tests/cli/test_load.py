import sys
import textwrap

import pytest

from streamflow.cli.load import load
from streamflow.errors import ConfigurationError


@pytest.fixture(autouse=True)
def imports_as_before(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str = "import streamflow as sf\napp = sf.App('shop')\n"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def refused(target: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(target)
    return str(caught.value)


TWO = "import streamflow as sf\none = sf.App('one')\ntwo = sf.App('two', partitions=7)\n"


# --- what works -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["orders_a.py", "./orders_a.py", "orders_a", "orders_a.py:app", "orders_a:app"])
def test_a_file_or_a_module(target, write):
    path = write("orders_a.py")
    loaded = load(target)
    assert (loaded.app.id, loaded.origin, loaded.name) == ("shop", path, target)


def test_a_file_from_another_folder_finds_its_neighbours(write, tmp_path, monkeypatch):
    write("deep/neighbour_b.py", "NAME = 'found'\n")
    write("deep/orders_b.py", "import neighbour_b\nimport streamflow as sf\napp = sf.App(neighbour_b.NAME)\n")
    assert load(str(tmp_path / "deep" / "orders_b.py")).app.id == "found"


def test_one_of_several_apps(write):
    write("orders_c.py", TWO)
    loaded = load("orders_c.py:two")
    assert (loaded.app.id, loaded.app.options) == ("two", {"partitions": 7})


def test_a_second_name_for_the_same_app_is_no_second_app(write):
    write("orders_d.py", "import streamflow as sf\napp = sf.App('shop')\napplication = app\n")
    assert load("orders_d.py").app.id == "shop"


def test_a_file_in_a_package_is_imported_by_its_dotted_name(write):
    write("pkg_e/__init__.py", "")
    write("pkg_e/inner/__init__.py", "")
    write("pkg_e/names.py", "ID = 'relative'\n")
    write("pkg_e/inner/orders.py", "from ..names import ID\nimport streamflow as sf\napp = sf.App(ID)\n")
    assert load("pkg_e/inner/orders.py").app.id == "relative"
    assert "pkg_e.inner.orders" in sys.modules
    assert load("pkg_e.inner.orders").app is load("pkg_e/inner/orders.py").app


def test_a_package(write):
    write("pkg_f/__init__.py")
    assert load("pkg_f").app.id == "shop"


def test_a_file_called_like_a_module_of_python_leaves_that_alone(write):
    import json

    write("json.py")
    assert load("json.py").app.id == "shop"
    assert sys.modules["json"] is json


def test_types_that_name_each_other_resolve(write):
    write(
        "orders_g.py",
        """
        from __future__ import annotations
        import msgspec
        import streamflow as sf

        class Line(msgspec.Struct):
            order: Order | None

        class Order(msgspec.Struct):
            id: int

        app = sf.App("shop")
        lines = app.topic("lines", value_type=Line)
        """,
    )
    assert list(load("orders_g.py").app.topics) == ["lines"]


def test_a_script_that_runs_itself_can_be_loaded(write):
    write("orders_h.py", "import streamflow as sf\napp = sf.App('shop')\napp.main()\n")
    assert load("orders_h.py").app.id == "shop"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ordres.py", "there is no such file; did you mean 'orders.py'?"),
        ("nowhere/x.py", "there is no such file; there is no Python file in"),
        (".", "is neither a file nor the dotted name"),
        ("./folder", "is a folder"),
        ("orders.py:", "ends with a colon"),
        ("orders.py:ap", "has no 'ap'; did you mean 'app'?"),
        ("orders.py:NUMBER", "'NUMBER' in orders.py is no sf.App but int; apps there: app"),
        ("two.py", "has several apps; say which one: two.py:one or two.py:two"),
        ("empty.py", 'has no sf.App at its top level: write `app = sf.App("my-app")` there'),
        ("no_such_module.orders", "there is no module 'no_such_module'"),
        ("folder.orders2", "there is no module 'folder.orders2'"),
        ("folder/orders3", "there is no such file"),
        ("9x", "is neither a file nor the dotted name"),
    ],
)
def test_what_is_wrong_is_said(target, message, write):
    write("orders.py", "import streamflow as sf\napp = sf.App('shop')\nNUMBER = 3\n")
    write("two.py", TWO)
    write("empty.py", "")
    write("folder/other.txt", "")
    assert message in refused(target)


def test_a_dotted_name_that_should_have_been_a_file(write):
    write("some/place.py")
    assert "did you mean" not in refused("some.plaice")


def test_an_error_at_import_shows_the_users_own_traceback(write):
    path = write("broken.py", "def f():\n    return 1 / 0\n\nf()\n")
    message = refused("broken.py")
    assert message.startswith("APP ")
    assert f'File "{path}", line 4' in message
    assert message.endswith("ZeroDivisionError: division by zero")
    assert "importlib" not in message
    assert "load.py" not in message


def test_a_missing_dependency_is_not_a_missing_app(write):
    write("needs.py", "import no_such_library\n")
    for target in ("needs.py", "needs"):
        message = refused(target)
        assert "could not be imported" in message
        assert "No module named 'no_such_library'" in message


def test_a_syntax_error(write):
    path = write("wrong.py", "def f(:\n")
    message = refused("wrong.py")
    assert f'File "{path}", line 1' in message
    assert "SyntaxError" in message


def test_a_misuse_is_told_with_its_place_and_without_a_traceback(write):
    path = write("misuse.py", "import streamflow as sf\n\napp = sf.App('shop', partitons=3)\n")
    message = refused("misuse.py")
    assert message == f"{path}:3: App(...) has no setting 'partitons'; did you mean 'partitions'?"


def test_a_script_that_exits_is_told(write):
    write("exits.py", "raise SystemExit(3)\n")
    assert "SystemExit: 3" in refused("exits.py")


def test_a_failed_import_leaves_nothing_behind(write):
    path = write("later.py", "1 / 0\n")
    refused("later.py")
    path.write_text("import streamflow as sf\napp = sf.App('shop')\n")
    assert load("later.py").app.id == "shop"
