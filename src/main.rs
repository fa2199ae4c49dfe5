//! The one binary: everything is in the library, see [`plimsoll`].

use std::process::ExitCode;

/// Measured against that of glibc and jemalloc (benches/README.md, wire).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    plimsoll::cli::main()
}
