PYTHON ?= python3
NOX := .venv/bin/nox --noxfile ci/noxfile.py

.PHONY: test demo clean

test: .venv/bin/nox  ## lint, types and all tests, each framework in its own pinned environment
	$(NOX)

demo: .venv/bin/nox  ## fine-tune a small MoE with and without DenseMixer: make demo ARGS="--help"
	$(NOX) --session demo -- $(ARGS)

clean:
	rm -rf .nox .venv

.venv/bin/nox: ci/environments/nox.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement ci/environments/nox.txt
	touch $@
