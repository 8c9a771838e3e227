import pytest

from .row_driver import Driver, compile_driver


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    library = tmp_path_factory.mktemp("simt") / "row_divergence.so"
    compile_driver(library, "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    return Driver(library)
