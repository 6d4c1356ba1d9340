PYTHON ?= python3
NOX := .venv/bin/nox --noxfile ci/noxfile.py

.PHONY: test test-more docs coverage demo experiment gradient-quality bench bench-large bench-budget gpu clean

test: .venv/bin/nox  ## lint, types and all tests, each framework in its own pinned environment
	$(NOX)

test-more: .venv/bin/nox  ## what make test has no time for: the oldest versions in full, and more frameworks
	$(NOX) --tags more

docs: .venv/bin/nox  ## build the pages, strictly, into outputs/site
	$(NOX) --session docs

coverage: .venv/bin/nox  ## make test, measuring which lines it runs
	rm -rf outputs/coverage
	mkdir -p outputs/coverage
	COVERAGE=1 $(NOX)
	$(NOX) --session coverage

demo: .venv/bin/nox  ## fine-tune a small MoE with and without DenseMixer: make demo ARGS="--help"
	$(NOX) --session demo -- $(ARGS)

experiment: .venv/bin/nox  ## does DenseMixer help a small MoE? see EVIDENCE.md: make experiment ARGS="--part router-only"
	$(NOX) --session experiment -- $(ARGS)

gradient-quality: .venv/bin/nox  ## the routers' gradient against the effect of changing the routing, see EVIDENCE.md
	$(NOX) --session gradient_quality -- $(ARGS)

bench: .venv/bin/nox  ## time steps on this machine, against conventional training, the original and the floor
	$(NOX) --session bench -- $(ARGS)

bench-large: .venv/bin/nox  ## time a budget at many tokens, where memory is most of the noise of bench
	$(NOX) --session bench_large -- $(ARGS)

bench-budget: .venv/bin/nox  ## how exact the extra gradient is at each budget
	$(NOX) --session bench_budget -- $(ARGS)

gpu:  ## on a GPU, with the Python at hand: the tests that mean something there and all timings, see docs/gpu.md
	$(PYTHON) ci/gpu.py $(ARGS)

clean:
	rm -rf .nox .venv

.venv/bin/nox: ci/environments/nox.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement ci/environments/nox.txt
	touch $@
