# `make quickstart` and `make test` do everything from nothing; both go through `make install`.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed

.PHONY: install quickstart test lint clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0" "numpy==2.3.5"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

quickstart: install
	$(VENV)/bin/deltanet-convert demo -o quickstart/student --hybrid global2 --overwrite
	$(VENV)/bin/deltanet-generate quickstart/student "Once upon a time" --max-new-tokens 60 --seed 0

test: install
	$(VENV)/bin/python -m pytest -n 2

lint:
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "ruff>=0.17"
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) quickstart build *.egg-info
