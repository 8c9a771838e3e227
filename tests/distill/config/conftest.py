import sys

import pytest

from .config_project import CONFIG, PROJECT


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with project.py and run.toml."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "project", raising=False)
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "run.toml").write_text(CONFIG)
    yield tmp_path
    sys.modules.pop("project", None)
