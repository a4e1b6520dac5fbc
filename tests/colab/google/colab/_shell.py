"""The kernel's shell. huggingface_hub takes a shell of this module for Colab, and none else."""

from ipykernel.zmqshell import ZMQInteractiveShell


class Shell(ZMQInteractiveShell):
    """Nothing but its name differs."""
