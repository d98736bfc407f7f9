# Every target makes its own .venv first; nothing has to be installed by hand but Python (and, for a real
# Apache Kafka in the demo and the tests, Java 17 and Maven: without them our development broker is used).
RUN := .venv/bin
export DO_NOT_TRACK := true

.PHONY: demo test test-slow chaos check bench backtest-cases bench-decisions bench-seasons format clean

.venv/complete: pyproject.toml constraints.txt .ci/make-venv
	@.ci/make-venv

# A drift being caught, a better model promoted, a crash survived. Options: make demo ARGS="--json --keep"
demo: .venv/complete
	@$(RUN)/retrain-daemon demo $(ARGS)

test: .venv/complete
	$(RUN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-slow: .venv/complete
	$(RUN)/python -m pytest -q -m slow $(ARGS)

# Everything killed, 200 times over or CHAOS_KILLS=n, and held against an undisturbed run; half an hour on a
# busy machine.
chaos: .venv/complete
	@$(RUN)/python tests/chaos/chaos.py

check: .venv/complete
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

# Ratios and medians, each of one run: no test depends on them.
bench: .venv/complete
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(RUN)/python $$file || exit 1; done

# Streams of third parties, which are not in this repository: make backtest-cases CASES=folder, with a cases.json
# in it. Options: ARGS="--case NAME --seeds 5 --label-lag 1 --jobs 2"
backtest-cases: .venv/complete
	@$(RUN)/python tests/bench/backtest_cases.py $(CASES) $(ARGS)

# Windows until a needless alarm, and until a needed one, on autocorrelated streams.
bench-decisions: .venv/complete
	@$(RUN)/python tests/bench/decisions.py $(ARGS)

# Inputs that follow the day or the week: needless alarms and detection delays, without slots and with them.
bench-seasons: .venv/complete
	@$(RUN)/python tests/bench/seasons.py $(ARGS)

format: .venv/complete
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
