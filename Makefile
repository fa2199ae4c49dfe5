# Two commands: `make demo` shows what Plimsoll is for, `make test` proves that it works.
# Both share one build profile, so the second one builds nothing twice.

.PHONY: demo test tools release install-cmake

demo: tools
	cargo run --locked -- demo

# What CI runs, in the order in which it fails fastest.
test: tools
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo test --locked
	RUSTDOCFLAGS="--deny warnings" cargo doc --locked --no-deps

# What ships: fat LTO, symbols kept. Takes its time.
release: tools
	cargo build --locked --release

# Pingora builds zlib-ng, which needs a C compiler and cmake; nothing else is installed, and it says so.
tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust first, see https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: apt-get install build-essential"; exit 1; }
	@command -v cmake >/dev/null || $(MAKE) --no-print-directory install-cmake

install-cmake:
	@echo "cmake is missing and Pingora needs it: installing Debian's package cmake"
	@if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq cmake
