"""Makes a kernel look like one on Colab. IPython runs the file that PYTHONSTARTUP names before the first cell."""

from google.colab._shell import Shell

get_ipython().__class__ = Shell  # noqa: F821
