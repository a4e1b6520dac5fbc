"""What holds for all test files."""

import gc


def pytest_collection_finish(session):
    """The collector looks no more at what imports have left, a million objects, of which each look takes longer than
    most tests. What tests make is collected as ever."""
    gc.collect()
    gc.freeze()
