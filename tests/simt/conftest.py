import ctypes
from ctypes import c_bool, c_int64

import pytest

from .building import LIBRARY, built
from .row_driver import Driver


@pytest.fixture(scope="session")
def folder_of_drivers(request, tmp_path_factory):
    """Kept from run to run, where pytest keeps anything."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("simt") if cache else tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="session")
def library(folder_of_drivers):
    """A driver of this folder, loaded. UBSan ends the process where an offset overflows."""
    return lambda source: ctypes.CDLL(str(built(folder_of_drivers, source, *LIBRARY)))


@pytest.fixture(scope="session")
def driver(folder_of_drivers):
    return Driver(built(folder_of_drivers, "row_divergence.cpp", *LIBRARY))


@pytest.fixture(scope="session")
def row_stats_driver(library):
    return library("row_stats.cpp")


@pytest.fixture(scope="session")
def persample_dot_driver(library):
    loaded = library("persample_dot.cpp")
    loaded.part_of.restype = c_int64
    loaded.part_of.argtypes = [c_int64] * 3
    loaded.vendor_multiplies.restype = c_bool
    loaded.vendor_multiplies.argtypes = [c_int64] * 4
    return loaded
