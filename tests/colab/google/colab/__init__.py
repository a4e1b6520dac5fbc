"""Stands in for the module of this name that only Colab has: what code asks of it to know where it runs.

The real one is open source: https://github.com/googlecolab/colabtools. Put `tests/colab` on PYTHONPATH, and a
process may import this; name `tests/colab/startup.py` in PYTHONSTARTUP, and every kernel has done so already.
"""
