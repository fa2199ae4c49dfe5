//! The one binary: everything is in the library, see [`plimsoll`].

use std::process::ExitCode;

fn main() -> ExitCode {
    plimsoll::cli::main()
}
