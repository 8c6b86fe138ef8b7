# make demo: install, then see a dense network become a branched one.
# make test: install, then run every check.
# Both install once into .venv and work offline afterwards.
# make test-exports: compiled engines, and the formats whose packages need environments of their own,
# .venv-executorch and .venv-vela: about 4 GB of disk.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test test-exports lint clean

demo: $(VENV)/.installed
	$(BIN)/sigmabranch demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/exports
	@echo "left out: tests/exports, which takes gigabytes and minutes: make test-exports"

test-exports: $(VENV)/.installed-test $(VENV)-executorch/.installed $(VENV)-vela/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/exports/test_aoti.py
	OMP_NUM_THREADS=1 $(VENV)-executorch/bin/python -m pytest tests/exports/test_executorch.py
	OMP_NUM_THREADS=1 $(VENV)-vela/bin/python -m pytest tests/exports/test_litert.py tests/exports/test_vela.py

$(VENV)-%/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(@D)
	echo '*' > $(@D)/.gitignore
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --editable '.[$*]' --group test
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-executorch $(VENV)-vela build dist runs
