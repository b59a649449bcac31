# Two commands set everything up on a fresh machine: `make demo` draws a picture, `make test` runs
# the tests. Both create .venv with the MLX backend that fits this machine. `make help` lists more.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check

# Metal comes with plain MLX on a Mac; on Linux CUDA where an NVIDIA driver answers, else the CPU.
BACKEND ?= $(shell if [ "$$(uname -s)" = Darwin ]; then echo metal; \
	elif nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; else echo cpu; fi)
EXTRA    = $(if $(filter metal,$(BACKEND)),,$(BACKEND))
comma   := ,

.PHONY: help demo gallery test breakage gpu-check serve-check browser parity parity-full lint types format check wheel-check docs clean

help:
	@echo "make demo         set up, draw a picture with the model that ships here, print its path"
	@echo "make gallery      draw the pictures of the README again"
	@echo "make test         set up and run the tests (no network, no torch)"
	@echo "make breakage     break one thing at a time and list the tests that fail"
	@echo "make gpu-check    draw with every feature on the GPU and on the CPU, and compare"
	@echo "make serve-check  call maple serve with other people's clients, attack it, kill it"
	@echo "make browser      use the page of maple serve in a real browser (a Chromium, and node)"
	@echo "make parity       compare live with torch, diffusers, transformers and k-diffusion"
	@echo "make parity-full  the same at true Stable Diffusion 1.4 size (12 GB of memory, minutes)"
	@echo "make lint types   ruff and pyright, as pre-commit and CI run them"
	@echo "make wheel-check  build the wheel and draw with it in an empty environment"

# One stamp per set of dependencies: made again when pyproject.toml changes.
$(VENV)/.run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, %s is %s: set PYTHON=…" \
	  % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --editable ".$(if $(EXTRA),[$(EXTRA)])"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))dev]"
	@touch $@

$(VENV)/.serve-check: $(VENV)/.dev
	$(PIP) install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))dev,serve-check]"
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(PIP) install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))dev,browser]"
	@touch $@

# k-diffusion asks for wandb and torchvision, which its samplers do not use, lycoris-lora for a
# trainer's tools: --no-deps. tomesd and DeepCache ask for what is there.
$(VENV)/.parity: $(VENV)/.dev
	$(PIP) install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))dev,parity]"
	$(PIP) install --quiet --no-deps k-diffusion==0.1.1.post1 lycoris-lora==4.1.3 tomesd==0.1.3 DeepCache==0.1.1
	@touch $@

# Four unguided steps of lcm draw it (see training/README.md): seconds on two slow cores, also without OpenBLAS.
demo: $(VENV)/.run
	@mkdir -p out
	$(BIN)/maple generate "a red maple leaf on a yellow background" --seed 7 --sampler lcm \
	  --steps 4 --guidance 1 -o out/demo.png --overwrite

gallery: $(VENV)/.run
	$(BIN)/python examples/gallery.py --output docs/images

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not parity and not slow"

breakage: $(VENV)/.dev
	$(BIN)/python tests/breakage.py

gpu-check: $(VENV)/.dev
	$(BIN)/python tests/gpu_agreement.py

serve-check: $(VENV)/.serve-check
	$(BIN)/python -m pytest -q tests/serve/check_*.py

browser: $(VENV)/.browser
	node --test tests/serve/page/
	$(BIN)/python -m pytest -q tests/serve/browser/check_*.py

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -q tests/parity -m "parity and not slow"

parity-full: $(VENV)/.parity
	$(BIN)/python -m pytest -q tests/parity -m "parity"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types test

wheel-check: $(VENV)/.dev
	PYTHON="$(BIN)/python" BACKEND="$(EXTRA)" sh .ci/wheel-check

clean:
	rm -rf $(VENV) build dist out .pytest_cache .ruff_cache
