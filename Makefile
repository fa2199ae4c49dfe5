# Two commands: `make demo` shows what Plimsoll is for, `make test` proves that it works.
# Both share one build profile, so the second one builds nothing twice.

.PHONY: demo test fuzz tools test-tools release install uninstall deb

demo: tools
	cargo run --locked -- demo

# What CI runs, in the order in which it fails fastest.
test: tools test-tools
	cargo fmt --check
	cargo clippy --locked --all-targets -- --deny warnings
	cargo test --locked
	RUSTDOCFLAGS="--deny warnings" cargo doc --locked --no-deps

# Any bytes against the properties in tests/fuzz, each target for FUZZ_SECONDS: an hour in all, on one core. What the
# fuzzer makes stays in target/fuzz, a finding in tests/fuzz/artifacts.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?= config digest metrics preface request stream

fuzz: tools
	@command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is missing: cargo install cargo-fuzz --locked"; exit 1; }
	@cargo +nightly --version >/dev/null 2>&1 || { echo "nightly is missing: rustup toolchain install nightly"; exit 1; }
	cp Cargo.lock tests/fuzz/Cargo.lock
	@set -e; for target in $(FUZZ_TARGETS); do \
		mkdir -p target/fuzz/corpus/$$target; \
		nice -n 19 cargo +nightly fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz $$target \
			target/fuzz/corpus/$$target tests/fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=2048 -print_funcs=0 -rss_limit_mb=2048 -timeout=10 -print_final_stats=1; \
	done

# What ships: fat LTO, symbols kept. Takes its time.
release: tools
	cargo build --locked --release

# Puts the program where programs are, with its unit, completions, manual and examples; a configuration that is there
# stays as it is. `make release` first. PREFIX is /usr for packages, DESTDIR where a package is put together.
PREFIX ?= /usr/local
BINARY ?= target/release/plimsoll
SHARE = $(DESTDIR)$(PREFIX)/share
CONFIG = $(DESTDIR)/etc/plimsoll/plimsoll.yaml
UNIT = $(DESTDIR)$(PREFIX)/lib/systemd/system/plimsoll.service
USERS = $(DESTDIR)$(PREFIX)/lib/sysusers.d/plimsoll.conf
BASH = $(SHARE)/bash-completion/completions/plimsoll
ZSH = $(SHARE)/zsh/site-functions/_plimsoll
FISH = $(SHARE)/fish/vendor_completions.d/plimsoll.fish

install:
	@test -x $(BINARY) || { echo "$(BINARY) is missing: make release"; exit 1; }
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/plimsoll
	install -d $(dir $(UNIT) $(USERS) $(BASH) $(ZSH) $(FISH) $(CONFIG)) $(SHARE)/man/man1 $(SHARE)/plimsoll
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' systemd/plimsoll.service > $(UNIT)
	install -m 0644 systemd/plimsoll.sysusers $(USERS)
	$(BINARY) completions bash > $(BASH)
	$(BINARY) completions zsh > $(ZSH)
	$(BINARY) completions fish > $(FISH)
	$(BINARY) man --into $(SHARE)/man/man1
	chmod 0644 $(UNIT) $(BASH) $(ZSH) $(FISH) $(SHARE)/man/man1/plimsoll*.1
	install -m 0644 conf/* systemd/plimsoll.env systemd/plimsoll.socket $(SHARE)/plimsoll
	test -e $(CONFIG) || { \
		sed 's|schema=plimsoll|schema=$(PREFIX)/share/plimsoll/plimsoll|' conf/minimal.yaml > $(CONFIG); \
		chmod 0644 $(CONFIG); \
	}

# Leaves the configuration.
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/plimsoll $(UNIT) $(USERS) $(BASH) $(ZSH) $(FISH)
	rm -f $(SHARE)/man/man1/plimsoll.1 $(SHARE)/man/man1/plimsoll-*.1
	rm -rf $(SHARE)/plimsoll

# A Debian package, of what `make install` installs: target/debian/*.deb.
deb: release
	@command -v cargo-deb >/dev/null || { echo "cargo-deb is missing: cargo install cargo-deb --locked"; exit 1; }
	rm -rf target/stage
	$(MAKE) --no-print-directory install DESTDIR=target/stage PREFIX=/usr
	cargo deb --locked --no-build

# Pingora builds zlib-ng, which needs a C compiler and cmake; nothing else is installed, and it says so.
tools:
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust first, see https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null || { echo "a C compiler is missing: apt-get install build-essential"; exit 1; }
	@command -v cmake >/dev/null || $(call install-packages,cmake,Pingora needs it)

# What some tests drive: Prometheus, a browser, systemd. Elsewhere those tests say SKIPPED without them; in CI, where that
# would be a failure, they are installed.
TEST_PACKAGES = $(if $(shell command -v promtool),,prometheus) $(if $(shell command -v chromedriver),,chromium chromium-driver) \
	$(if $(shell command -v systemd-analyze),,systemd)

test-tools:
	@if [ -n "$(strip $(TEST_PACKAGES))" ]; then \
		if [ "$$CI" = true ]; then $(call install-packages,$(strip $(TEST_PACKAGES)),tests drive them); \
		else echo "some tests will be SKIPPED, for want of Debian's packages: $(strip $(TEST_PACKAGES))"; fi; \
	fi

# $(1): Debian's packages; $(2): why.
define install-packages
{ \
	echo "installing Debian's packages $(1): $(2)"; \
	if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1); \
}
endef
