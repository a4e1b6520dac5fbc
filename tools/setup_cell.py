# @title Setup
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/diffusion-notebooks/diffusion-notebooks"

# On Colab: fetch the repository, then install what is missing. Elsewhere all is in place already.
if "google.colab" in sys.modules and Path.cwd().name != "notebooks":
    folder = Path(REPOSITORY).name
    if not Path(folder).exists():
        if subprocess.run(["git", "clone", "--quiet", "--depth=1", "--branch=main", REPOSITORY]).returncode:
            raise RuntimeError(f"{REPOSITORY} could not be fetched: check the network, then run this cell again.")
    os.chdir(Path(folder, "notebooks"))
    have = {str(d.name).lower().replace("_", "-") for d in importlib.metadata.distributions()}
    wanted = [line for line in Path("../requirements.txt").read_text().splitlines() if ">=" in line]
    missing = [line for line in wanted if line.split(">=")[0] not in have]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# Notebooks live in notebooks/; `helpers` and `storybook` live one folder up.
if str(Path.cwd().parent) not in sys.path:
    sys.path.insert(0, str(Path.cwd().parent))
