"""Which models there are, what fits this machine, where the files are, and how a pipeline is made of them."""
