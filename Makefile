# `make` lists the targets. Each that needs Python makes .venv itself, from requirements.txt.

# The first Python >= 3.11 that can make a virtual environment. Each is run, not only looked for: a command
# of that name may be a version manager's stub.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)
PY := .venv/bin/python
STAMP := .venv/.installed
START := $(shell date +%s)

# The stages below make a run in $(RUN); `make smoke` calls them with the shrunk variants.
RUN := runs/quickstart
AUTOENCODER := experiments/quickstart.py:autoencoder
TRANSFUSION := experiments/quickstart.py
EVALUATE :=

.PHONY: help quickstart smoke test test-slow test-cluster lint mutants golden clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

quickstart: $(RUN)/report.html  ## Train, evaluate and report a small Transfusion on a CPU
	@s=$$(( $$(date +%s) - $(START) )); echo; echo "report:  $(abspath $<)"; \
	echo "elapsed: $$(( s / 60 )) min $$(( s % 60 )) s; finished stages are not repeated, \`make clean\` deletes them"

# A stage is done when the file that it writes last is there; one that was interrupted is run again, and
# training then goes on from its last checkpoint.
$(RUN)/autoencoder/summary.json: | $(STAMP)
	@echo; echo "[1/5] autoencoder: learns to turn pictures into small latents and back"
	$(PY) -m tfusion.train --config=$(AUTOENCODER) --workdir=$(RUN)/autoencoder

$(RUN)/data/meta.json: $(RUN)/autoencoder/summary.json
	@echo; echo "[2/5] prepare: tokenises the text and encodes the pictures, once"
	$(PY) -m tfusion.prepare --config=$(TRANSFUSION) --codec=$(RUN)/autoencoder

$(RUN)/transfusion/summary.json: $(RUN)/data/meta.json
	@echo; echo "[3/5] transfusion: trains one transformer on both, next-token loss and diffusion loss"
	$(PY) -m tfusion.train --config=$(TRANSFUSION) --workdir=$(RUN)/transfusion

$(RUN)/transfusion/evaluation/metrics.json: $(RUN)/transfusion/summary.json
	@echo; echo "[4/5] evaluate: draws held-out captions, describes held-out pictures, scores both"
	$(PY) -m tfusion.evaluate --workdir=$(RUN)/transfusion $(EVALUATE)

$(RUN)/report.html: $(RUN)/transfusion/evaluation/metrics.json
	@echo; echo "[5/5] report: one HTML page of pictures, curves and figures"
	$(PY) -m tfusion.report --workdir=$(RUN)/transfusion --out=$(RUN)/report.html

smoke:  ## The quickstart shrunk to seconds of training, from scratch, in runs/smoke
	@rm -rf runs/smoke
	@$(MAKE) --no-print-directory quickstart RUN=runs/smoke EVALUATE=--number=16 \
		AUTOENCODER=experiments/quickstart.py:smoke,autoencoder TRANSFUSION=experiments/quickstart.py:smoke

test: $(STAMP)  ## The fast tests (ARGS="-k masks" picks some)
	$(PY) -m pytest -m "not slow and not cluster" -n auto --dist=loadfile $(ARGS)

test-slow: $(STAMP)  ## The slow tests
	$(PY) -m pytest -m slow $(ARGS)

# Nothing of the system's is touched: SLURM's daemons run in a folder. They are to be there already (Debian:
# apt-get install slurm-wlm munge); tests that miss something are skipped and say so, with TFUSION_CI=1 they fail.
test-cluster: $(STAMP) .venv-launch/.installed  ## The tests on a SLURM of their own, and against launchers' tools
	$(PY) -m pytest -m cluster -rs $(ARGS)

lint: $(STAMP)  ## ruff
	$(PY) -m ruff check .

mutants: $(STAMP)  ## Put each fault of tests/mutants.txt in: its test must fail
	$(PY) -m tests.mutants

golden: $(STAMP)  ## BASE=rev: train this tree and that revision, compare the losses bit by bit
	@test -n "$(BASE)" || { echo "error: name a revision to compare with: make golden BASE=HEAD~1"; exit 1; }
	$(PY) -m tests.golden --base=$(BASE)

clean:  ## Delete runs/quickstart and runs/smoke
	rm -rf runs/quickstart runs/smoke

# A .venv that works is kept; what was put into it by hand (a GPU plugin) stays.
$(STAMP): requirements.txt setup.py
	@if $(PY) -c 'import pip; $(USABLE)' 2>/dev/null; then :; \
	elif [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(USABLE)' 2>/dev/null; then \
		echo "error: no usable Python: 3.11 or later with venv is needed (Debian: apt install python3-venv);" \
			"to name one: make PYTHON=/path/to/python3.11"; exit 1; \
	else echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; fi
	@echo "installing requirements.txt into .venv: $$(grep -c == requirements.txt) packages, once"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# What tests/launch holds our scripts against: launchers and linters, 137 packages. By uv: pip takes minutes.
.venv-launch/.installed: tests/launch/requirements.txt | $(STAMP)
	@$(PY) -m venv --clear .venv-launch
	@.venv-launch/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	@.venv-launch/bin/uv pip install --quiet --python .venv-launch/bin/python -r tests/launch/requirements.txt
	@touch $@
