# make lab     opens JupyterLab on the first notebook
# make test    runs all checks: ruff, unit tests, every notebook
# make test-colab                runs unit tests and notebooks on Colab's own versions
# make test-browser              runs the panel of notebook 00 in JupyterLab and Chromium
# make test-gpu                  runs what needs CUDA: tests, the full-size rehearsal (16 GB of disk), benchmarks
# make train   rebuilds the bundled models from nothing (on a CPU: hours)
# make evaluate                  recomputes the figures in the model cards
# make badges REPO=owner/name    points badges and setup cells at your fork
# make clean   removes caches; models, outputs and environments stay
# make distclean                 removes the environments too

SHELL := /bin/bash
PYTHON ?= python3
# Everything is run as `python -m`: the scripts beside it name the path of the installation, and a repository may move.
PY := .venv/bin/python
STAMP := .venv/installed
COLAB_PY := .venv-colab/bin/python
COLAB_STAMP := .venv-colab/installed

# In a container you are root, which Jupyter wants to hear confirmed.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

# An environment whose Python is gone, as after a move to another machine, is made again.
$(shell for env in .venv .venv-colab; do test -x $$env/bin/python || rm -f $$env/installed; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two workers. Whichever has no unit test left takes some of the other's; each notebook stays on one of them. A kernel
# may take minutes to start where much else is running.
PYTEST := -m pytest -q -n 2
UNIT := $(PYTEST) --dist worksteal
NBVAL := $(PYTEST) --dist loadfile --durations 5 --nbval-lax --nbval-current-env --nbval-cell-timeout 300 \
	--nbval-kernel-startup-timeout 300 notebooks
# As on a machine with no GPU and no network.
ALONE := CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1

.PHONY: lab test test-colab test-gpu test-browser train evaluate badges clean distclean

# JupyterLab's question whether you want its news is answered in tools/jupyter: no, unless your own settings say yes.
lab: $(STAMP)
	JUPYTER_CONFIG_PATH="$(CURDIR)/tools/jupyter" $(PY) -m jupyterlab $(AS_ROOT) notebooks/00_start_here.ipynb

# One thread for each worker.
test test-colab: export OMP_NUM_THREADS := 1

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) $(UNIT)
	$(ALONE) $(PY) $(NBVAL)

# google.colab is a stand-in, which pytest and every kernel import before anything else, as Colab's kernels do.
test-colab: export PYTHONPATH := $(CURDIR)/tests/colab
test-colab: export PYTHONSTARTUP := $(CURDIR)/tests/colab/startup.py
test-colab: $(COLAB_STAMP)
	$(COLAB_PY) $(UNIT) -p google.colab
	$(ALONE) $(COLAB_PY) $(NBVAL)

test-gpu: $(STAMP)
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and \
		"There is no GPU that PyTorch can use here: run make test-gpu on a machine with CUDA.")'
	$(PY) -m pytest -q tests/test_gpu.py
	test -e build/sd35/model_index.json || $(PY) tests/rehearsal/checkpoint.py build/sd35
	$(PY) tests/rehearsal/measure.py build/sd35 --plans staged no-t5 model-offload --sizes 512 --pictures 2
	$(PY) -m benchmarks.from_scratch --cuda --folder build/sd15

# Idle threads sleep, since spinning ones would stall the browser. Elsewhere sleeping ones are slow to wake: with two
# threads on a virtual machine, page 04 took 116 s and not 71.
test-browser: export OMP_WAIT_POLICY := PASSIVE
test-browser: $(STAMP)
	$(ALONE) $(PY) -m pytest -q tests/browser/check_panel.py

train: $(STAMP)
	$(PY) -m storybook.train

evaluate: $(STAMP)
	$(PY) -m storybook.evaluate models/storybook-sd --guidance 4
	$(PY) -m storybook.evaluate models/storybook-sd3 --guidance 5

# Neither make nor the shell reads what REPO holds; tools.badges does.
override REPO := $(value REPO)
export REPO
badges:
	@$(PYTHON) -m tools.badges "$$REPO"

clean:
	rm -rf .pytest_cache .ruff_cache build *.egg-info notebooks/.ipynb_checkpoints
	find helpers from_scratch storybook tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf .venv .venv-colab

$(STAMP): requirements-dev.txt constraints.txt
$(STAMP): WANTED := -r requirements-dev.txt -c constraints.txt
$(COLAB_STAMP): constraints-colab.txt
$(COLAB_STAMP): WANTED := -r requirements-test.txt -c constraints-colab.txt

# The stamp is written last: an installation that was cut off is taken up again.
$(STAMP) $(COLAB_STAMP): requirements.txt requirements-test.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer, or name it:" \
		"make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer, not " \
		+ sys.version.split()[0] + "; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@$(@D)/bin/python -m pip --version >/dev/null 2>&1 || { \
		echo "Creating $(@D) (a few minutes the first time)"; $(PYTHON) -m venv --clear $(@D); }
	@$(@D)/bin/python -m pip install --quiet -r requirements.txt $(WANTED)
	@touch $@
