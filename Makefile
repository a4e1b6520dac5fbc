# make lab     opens JupyterLab on the first notebook
# make test    runs all checks: ruff, unit tests, every notebook
# make train   rebuilds the bundled models from nothing (on a CPU: hours)
# make evaluate                  recomputes the figures in the model card
# make badges REPO=owner/name    points badges and setup cells at your fork
# make clean   removes caches; models, outputs and .venv stay

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

# Idle threads sleep rather than spin: spinning ones stall whatever else runs on the machine.
export OMP_WAIT_POLICY := PASSIVE
# In a container you are root, which Jupyter wants to hear confirmed.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab test train evaluate badges clean

lab: $(STAMP)
	$(BIN)/jupyter lab $(AS_ROOT) notebooks/00_start_here.ipynb

# Two workers with one thread each. Notebooks run as on a machine with no GPU and no network.
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q -n 2 --dist loadfile
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n 2 --dist loadfile --durations 5 \
		--nbval-lax --nbval-current-env --nbval-cell-timeout 300 notebooks

train: $(STAMP)
	$(BIN)/python -m storybook.train

evaluate: $(STAMP)
	$(BIN)/python -m storybook.evaluate models/storybook-sd

badges:
	@$(PYTHON) -m tools.badges "$(REPO)"

clean:
	rm -rf .pytest_cache .ruff_cache build *.egg-info notebooks/.ipynb_checkpoints
	find helpers from_scratch storybook tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last: an installation that was cut off is taken up again.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer, not " \
		+ sys.version.split()[0] + "; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@test -x $(BIN)/pip || { echo "Creating .venv (a few minutes the first time)"; $(PYTHON) -m venv .venv; }
	@$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $@
