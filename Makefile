VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python

.PHONY: help run demo test check faults chaos bench bench-web screenshots format vendor clean

help:
	@echo "make run     hub on 127.0.0.1:8080 with this machine as its first server"
	@echo "make demo    the seven-task pipeline on two agents in scratch directories (CHECK=1: ends)"
	@echo "make test    everything, from nothing"
	@echo "make faults  the catalogue of faults, N=200 kills each; its table into faults.md"
	@echo "make chaos   clients and a nemesis for MINUTES=60, and the verdict"
	@echo "make check   style, without running anything"
	@echo "make bench   measurements beside a reference in the same run"
	@echo "make bench-web     how fast the pages are, in a real browser"
	@echo "make screenshots   pictures of the pages, into docs/screenshots"
	@echo "make vendor  the browser's third-party files anew, as scripts/vendor.json names them"

$(VENV)/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Orchestratia needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

run: $(VENV)/run
	@scripts/need.sh tmux=tmux git=git
	@$(PY) scripts/run.py

demo: $(VENV)/run
	@scripts/need.sh tmux=tmux git=git
	@CHECK=$(CHECK) $(PY) scripts/demo.py

test: $(VENV)/dev check
	@scripts/need.sh tmux=tmux git=git chromium=chromium
	$(PY) -m pytest -n 4 --dist worksteal --reruns 1 -r R

faults: $(VENV)/dev
	@scripts/need.sh tmux=tmux git=git
	FAULTS_N=$(or $(N),200) FAULTS_TABLE=faults.md $(PY) -m pytest -n 3 --dist worksteal -m fault

chaos: $(VENV)/dev
	@scripts/need.sh tmux=tmux git=git
	$(PY) tests/chaos.py --minutes $(or $(MINUTES),60)

check: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/dev
	$(PY) benchmarks/cascade.py
	$(PY) benchmarks/sockets.py
	$(PY) benchmarks/answers.py
	$(PY) benchmarks/telegram.py

vendor:
	@scripts/need.sh npm=npm
	$(PYTHON) scripts/vendor.py

bench-web: $(VENV)/dev
	@scripts/need.sh tmux=tmux git=git chromium=chromium
	$(PY) benchmarks/web.py

screenshots: $(VENV)/dev
	@scripts/need.sh tmux=tmux git=git chromium=chromium
	$(PY) scripts/screenshots.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
