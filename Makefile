# What a newcomer needs. `make` alone says what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Recipes use cargo, which brings its own parallelism.
.NOTPARALLEL:
.PHONY: help setup setup-tests demo test torture fuzz bench bench-quick bench-hypertables bench-micro fixtures lint release deb

help: ## Says what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r target text; do printf '  make %-12s %s\n' "$$target" "$$text"; done

setup: ## Installs what is missing (PostgreSQL's programs and a few tools; touches no cluster)
	@scripts/setup.sh

setup-tests: # What only the tests need, too
	@scripts/setup.sh tests

demo: setup ## Moves a shop between two throwaway servers while it is being written to
	cargo build --release --locked --bin walferry
	target/release/walferry demo

# One more at once than there are cores: some tests wait half a minute for a silence to be long enough.
test: setup-tests ## Runs every test; they start servers of their own
	@scripts/servers.sh 10 12 13 14 15 16 17 18 tools >/dev/null || echo "make: without servers of other versions their tests are skipped, or with CI=true fail" >&2
	@if cargo nextest --version >/dev/null 2>&1; then \
		cargo nextest run --locked --no-fail-fast --all-targets --test-threads "$$(($$(nproc) + 1))" && cargo test --locked --doc; \
	else \
		cargo test --locked --no-fail-fast --all-targets && cargo test --locked --doc; \
	fi

fixtures: setup ## Captures the proto-fixtures from a server of each version again
	cargo run --locked --example capture-fixtures -- "$$(scripts/servers.sh)"

lint: ## Checks format, lints and documentation
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

release: ## Builds the program for other machines, in target/dist
	@scripts/release.sh

deb: ## Builds a package for Debian and Ubuntu, in target/debian (needs cargo-deb)
	@scripts/deb.sh

torture: setup-tests ## Migrates while everything breaks: SEED=1 MINUTES=10 (or ROUNDS=20)
	SEED=$(SEED) MINUTES=$(MINUTES) ROUNDS=$(ROUNDS) cargo test --locked --test torture -- --ignored --exact hunt --nocapture

fuzz: ## Fuzzes one of decode, queue_recovery, connection_string: TARGET=decode SECONDS=300 (needs cargo-fuzz and a nightly Rust)
	cd fuzz && cargo +nightly fuzz run $(TARGET) -- -max_total_time=$(or $(SECONDS),300)

bench: setup ## Measures walferry beside its peers on servers of its own; writes bench/results.md and .svg
	cargo build --release --locked --bin walferry --example bench
	target/release/examples/bench

bench-quick: setup ## The same in under five minutes, with smaller sizes; writes bench/results-quick.md and .svg
	cargo build --release --locked --bin walferry --example bench
	target/release/examples/bench --quick

bench-hypertables: setup ## Measures hypertables: ten minutes of ingest, changed rows, 5,000 chunks (needs TimescaleDB); writes bench/hypertables
	cargo build --release --locked --bin walferry --example bench
	target/release/examples/bench --only T1,T2,T3 --out bench/hypertables

bench-micro: ## Measures decoding, the queue and the apply by themselves with criterion, without servers
	cargo bench --locked --bench decode --bench queue --bench apply
