# make lab     opens JupyterLab on the first notebook
# make test    runs all checks: ruff, unit tests, every notebook
# make test-colab                runs unit tests and notebooks on Colab's own versions
# make train   rebuilds the bundled models from nothing (on a CPU: hours)
# make evaluate                  recomputes the figures in the model cards
# make badges REPO=owner/name    points badges and setup cells at your fork
# make clean   removes caches; models, outputs and environments stay

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
COLAB_BIN := .venv-colab/bin
COLAB_STAMP := .venv-colab/installed

# Idle threads sleep rather than spin: spinning ones stall whatever else runs on the machine.
export OMP_WAIT_POLICY := PASSIVE
# In a container you are root, which Jupyter wants to hear confirmed.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two workers, each notebook on one of them. A kernel may take minutes to start where much else is running.
PYTEST := pytest -q -n 2 --dist loadfile
NBVAL := $(PYTEST) --durations 5 --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
	--nbval-kernel-startup-timeout 300 notebooks
# As on a machine with no GPU and no network.
ALONE := CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1

.PHONY: lab test test-colab train evaluate badges clean

lab: $(STAMP)
	$(BIN)/jupyter lab $(AS_ROOT) notebooks/00_start_here.ipynb

# One thread for each worker.
test test-colab: export OMP_NUM_THREADS := 1

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/$(PYTEST)
	$(ALONE) $(BIN)/$(NBVAL)

# google.colab is a stand-in, which pytest and every kernel import before anything else, as Colab's kernels do.
test-colab: export PYTHONPATH := $(CURDIR)/tests/colab
test-colab: export PYTHONSTARTUP := $(CURDIR)/tests/colab/startup.py
test-colab: $(COLAB_STAMP)
	$(COLAB_BIN)/$(PYTEST) -p google.colab
	$(ALONE) $(COLAB_BIN)/$(NBVAL)

train: $(STAMP)
	$(BIN)/python -m storybook.train

evaluate: $(STAMP)
	$(BIN)/python -m storybook.evaluate models/storybook-sd --guidance 2
	$(BIN)/python -m storybook.evaluate models/storybook-sd3 --guidance 3

badges:
	@$(PYTHON) -m tools.badges "$(REPO)"

clean:
	rm -rf .pytest_cache .ruff_cache build *.egg-info notebooks/.ipynb_checkpoints
	find helpers from_scratch storybook tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMP): requirements-dev.txt constraints.txt
$(STAMP): WANTED := -r requirements-dev.txt -c constraints.txt
$(COLAB_STAMP): constraints-colab.txt
$(COLAB_STAMP): WANTED := -r requirements-test.txt -c constraints-colab.txt

# The stamp is written last: an installation that was cut off is taken up again.
$(STAMP) $(COLAB_STAMP): requirements.txt requirements-test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer, not " \
		+ sys.version.split()[0] + "; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(@D)/bin/pip || { echo "Creating $(@D) (a few minutes the first time)"; $(PYTHON) -m venv $(@D); }
	@$(@D)/bin/pip install --quiet -r requirements.txt $(WANTED)
	@touch $@
