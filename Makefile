# `make quickstart` and `make test` do everything from nothing; both go through `make install`.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: install quickstart test test-oldest lint clean

install: $(VENV)/.installed

# torch comes first and pinned: otherwise the resolver picks the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -c constraints.txt torch numpy
	$(VENV)/bin/python $(PIP) -c constraints.txt -e ".[test]"
	touch $@

# Where other work shares the cores, OMP_WAIT_POLICY=PASSIVE keeps most of the speed; on idle ones it halves it.
quickstart: install
	$(VENV)/bin/deltanet-distill recipes/quickstart.yaml -o quickstart
	$(VENV)/bin/deltanet-generate quickstart/export "Once upon a time" --max-new-tokens 60

test: install
	$(VENV)/bin/python -m pytest -n 2

# The model against the oldest transformers that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/deltanet --ignore tests/deltanet/ops -n 2 -p no:cacheprovider

$(OLDEST)/.installed: constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt torch numpy triton transformers huggingface_hub peft safetensors pytest pytest-xdist
	touch $@

lint:
	$(VENV)/bin/python $(PIP) "ruff>=0.17"
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) quickstart build *.egg-info
