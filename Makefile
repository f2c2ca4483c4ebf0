# make lab     sets everything up and opens the course          (the first time: minutes; later: seconds)
# make test    sets everything up and runs every test
# make         lists the rest
#
# Works with the make and the bash of Linux, macOS and Windows' WSL.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
VENV ?= .venv
LAB_FLAGS ?=
NB ?= $(wildcard notebooks/*.ipynb solutions/*/*.ipynb)

PY := $(VENV)/bin/python
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
VERSION := import sys; print(sys.version_info[:2])

# Idle OpenMP threads that spin make a training step five times slower on shared cores; threads that sleep at once make
# it twice as slow on idle ones. So they spin for some microseconds, then sleep.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 20000

CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test

# The environment is unfit when it is missing or half made, its Python is gone or unsupported, the folder was
# moved since, or PYTHON asks for another version.
FIT := $(shell ( \
    { [ "$$(cat $(CREATED))" = "$(CURDIR)" ] || { [ ! -e $(CREATED) ] && $(PY) -m pip --version; }; } \
    && $(PY) -c '$(SUPPORTED)' \
    && { [ -z "$(PYTHON)" ] || [ "$$($(PYTHON) -c '$(VERSION)')" = "$$($(PY) -c '$(VERSION)')" ]; } \
    ) > /dev/null 2>&1 && echo yes)
ifneq ($(FIT),yes)
.PHONY: $(CREATED)
endif

.PHONY: help lab test setup jupyter notebooks tidy release grade matrix lint format parity claims bench doctor clean

help:
	@echo 'make lab        set everything up and open JupyterLab     (LAB_FLAGS="--port 9999", PYTHON=python3.12)'
	@echo 'make test       set everything up and run every test, the notebooks included'
	@echo 'make setup      set everything up and say whether the course can run, without opening anything'
	@echo 'make jupyter    open JupyterLab without looking whether the course can run'
	@echo 'make doctor     say what this machine is, and what to do where something is wrong'
	@echo 'make notebooks  execute all notebooks, or one: NB=notebooks/08_finetune.ipynb'
	@echo 'make tidy       rewrite notebooks as the project writes them, after an edit of the text alone'
	@echo 'make release    make exercises/ from solutions/: what students receive'
	@echo 'make grade      grade a folder of submissions: SUBMISSIONS=folder, OUT=grades'
	@echo 'make matrix     try every check on its wrong and right answers: SEEDS=100 for each 100 times'
	@echo 'make parity     compare the course with bitsandbytes and PEFT, bit for bit'
	@echo 'make claims     recompute every claim of the ledger and print its verdict'
	@echo 'make bench      measure kernels and a QLoRA step on this machine against the libraries'
	@echo 'make lint       ruff, and how the notebooks are kept'
	@echo 'make format     format the code'
	@echo 'make clean      remove the environment and the caches in this folder (the model stays)'

$(CREATED):
ifneq ($(FIT),yes)
	@for python in $(PYTHONS) ""; do "$$python" -c '$(SUPPORTED)' 2> /dev/null && break; done; \
	if [ -z "$$python" ]; then \
	    echo 'The course needs Python 3.11 to 3.14 with its venv module; none of these is one: $(PYTHONS)'; \
	    echo 'Install one (on Debian and Ubuntu: apt install python3-venv), or name yours: make lab PYTHON=/path/to/python3.12'; \
	    exit 1; \
	fi; \
	echo "Making the environment $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
endif
	@echo "$(CURDIR)" > $@

# pip's own output goes to a file; what shows is a dot for each package, large downloads by name, and errors.
define install
	@echo 'Installing the packages: a few minutes the first time, about 2 GB on disk.'
	@set -o pipefail; \
	$(PY) -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt -e '$(1)' 2>&1 \
	| tee $(VENV)/install.log \
	| while IFS= read -r line; do case "$$line" in \
	    Collecting*) printf . ;; \
	    *Downloading*[0-9][0-9].[0-9]\ MB\)*) echo; echo "$${line#"$${line%%[! ]*}"}" ;; \
	    Installing\ collected*) echo; echo 'Unpacking them (a minute or two)' ;; \
	    ERROR*|error*|*"No space left"*) echo; echo "$$line" ;; \
	esac; done \
	|| { echo 'The installation stopped. What pip said is in $(VENV)/install.log; the same command tries again.'; exit 1; }
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
	    > $(VENV)/share/jupyter/lab/settings/overrides.json
	@$(PY) -c 'import matplotlib.font_manager' 2> /dev/null  # builds the font list once, not in a notebook
endef

$(INSTALLED): pyproject.toml constraints.txt $(CREATED)
	$(call install,.)
	@touch $@

$(TEST_INSTALLED): pyproject.toml constraints.txt $(CREATED)
	$(call install,.[test])
	@touch $(INSTALLED) $@

setup: $(INSTALLED)
	@$(PY) -m qlora_edu.doctor --fetch

lab: setup
	$(open_lab)

jupyter: $(INSTALLED)
	$(open_lab)

# A browser opens where there is a display. Ctrl-C ends the server at once (answer_yes). Nothing asks a network
# address (readonly extension manager), and other users of the machine cannot read the kernels' messages.
define open_lab
	@browser=--no-browser; \
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then browser=; fi; \
	root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	echo 'Opening notebooks/00_start_here.ipynb; Ctrl-C here ends JupyterLab.'; \
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m jupyterlab $$browser $$root --ServerApp.log_level=WARN --LabApp.log_level=WARN \
	    --ServerApp.answer_yes=True --ServerApp.root_dir=. --LabApp.extension_manager=readonly \
	    --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
	    --KernelManager.transport_encryption=auto $(LAB_FLAGS)
endef

test: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.doctor --fetch || true
	@$(PY) -m pytest tests notebooks solutions --nbval --nbval-current-env --nbval-cell-timeout=600 \
	    --nbval-sanitize-with=tests/nbval_sanitize.cfg

notebooks: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.notebooks execute $(NB)

tidy: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.notebooks tidy $(NB)

release: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.notebooks release solutions exercises

SUBMISSIONS ?=
OUT ?= grades

grade: $(TEST_INSTALLED)
	@if [ -z "$(SUBMISSIONS)" ]; then echo 'Say which folder: make grade SUBMISSIONS=folder'; exit 1; fi
	@$(PY) -m qlora_edu.grading "$(SUBMISSIONS)" --out "$(OUT)"

matrix: $(TEST_INSTALLED)
	@$(PY) -m tests.matrix $(if $(SEEDS),--seeds $(SEEDS))

lint: $(TEST_INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m qlora_edu.notebooks check $(wildcard notebooks/*.ipynb solutions/*/*.ipynb)

format: $(TEST_INSTALLED)
	@$(PY) -m ruff format .

parity: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.parity

claims: $(TEST_INSTALLED)
	@$(PY) -m qlora_edu.claims

bench: $(TEST_INSTALLED)
	@failed=0; for kernels in auto torch; do QLORA_EDU_KERNELS=$$kernels $(PY) benchmarks/cpu_kernels.py || failed=1; echo; done; \
	$(PY) benchmarks/qlora_step.py || failed=1; echo; \
	$(PY) benchmarks/gpu_kernels.py || [ $$? = 2 ] || failed=1; exit $$failed

doctor: $(INSTALLED)
	@$(PY) -m qlora_edu.doctor

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
