# `make demo` and `make test` are all a newcomer needs; each makes its own environment from nothing but Python >= 3.11.
# On a machine with a GPU and nvcc the CUDA lane is built; elsewhere the XLA implementation serves. CUDA=AUTO|ON|OFF overrides.
PYTHON ?= python3
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CUDA ?= $(if $(HAS_GPU),AUTO,OFF)
comma := ,
GPU_EXTRA := $(if $(HAS_GPU),$(comma)cuda)
SOURCES := pyproject.toml CMakeLists.txt $(shell find cuda jax_na flax_layers -type f -not -name '*.pyc' 2>/dev/null)

# Import what was installed, CUDA lane included, not the checkout that the command runs in.
INSTALLED := PYTHONSAFEPATH=1

.PHONY: demo test parity lint cuda clean

# A script, not -m: so that the installed package with its CUDA lane is imported, not the checkout.
demo: .venv-demo/installed
	.venv-demo/bin/python examples/demo.py

test: .venv-test/installed
	$(INSTALLED) .venv-test/bin/python -m pytest -n 2 --dist worksteal -m "not slow" tests

# The models beside PyTorch models written by others, with the same random weights; and what takes long: a generator at 256 pixels.
parity: .venv-parity/installed
	$(INSTALLED) .venv-parity/bin/python -m pytest tests/flax_layers/test_parity.py
	$(INSTALLED) .venv-parity/bin/python -m pytest -m slow tests/flax_layers

lint: .venv-lint/installed
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run --Werror $(shell git ls-files 'cuda/*.h' 'cuda/*.cuh' 'cuda/*.cu' 'cuda/*.cc' 'tests/*.cpp')
	.venv-lint/bin/mypy

# The CUDA lane on a machine with nvcc (no GPU needed to build it), and the tests of its lowering.
cuda: .venv-cuda/installed
	$(INSTALLED) .venv-cuda/bin/python -c "import jax_na; print(jax_na.cuda_status())"
	$(INSTALLED) .venv-cuda/bin/python -m pytest tests/test_cuda_lowering.py

.venv-demo/installed: EXTRAS = demo
.venv-test/installed: EXTRAS = test
.venv-parity/installed: EXTRAS = test,parity
.venv-lint/installed: EXTRAS = dev,test
.venv-cuda/installed: EXTRAS = test
.venv-parity/installed: CUDA = OFF
.venv-lint/installed: CUDA = OFF
.venv-cuda/installed: CUDA = ON

.venv-%/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet -Ccmake.define.JAX_NA_CUDA=$(CUDA) ".[$(EXTRAS)$(GPU_EXTRA)]"
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-parity .venv-lint .venv-cuda build
