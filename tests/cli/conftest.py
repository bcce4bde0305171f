import pytest

from tests.cli.commands import shell_in


@pytest.fixture
def shell(tmp_path):
    with shell_in(tmp_path) as shell:
        yield shell
