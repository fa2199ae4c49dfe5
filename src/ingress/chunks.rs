//! Where a chunked body ends (RFC 9112 s.7.1), by its bytes as they pass.
//!
//! Strict where readers differ: a size has digits, lines end in CRLF, an extension holds nothing but
//! printable text. Nothing is copied or taken out; the reader behind parses the same bytes again, and finds
//! the same end.

/// More than this of extensions or trailers is no use of them.
const LINE_LIMIT: u16 = 1024;
const TRAILERS_LIMIT: u16 = 4 * 1024;

/// More digits than any size below 2^60 has.
const DIGITS_LIMIT: u16 = 15;

/// The bytes are not what they have to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// What comes next of a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// Digits of a size: how many there were, and what they say.
    Size(u16, u64),
    /// An extension of the chunk of that size, and how long it is.
    Extension(u16, u64),
    /// The LF after the size.
    SizeEnd(u64),
    /// So much data.
    Data(u64),
    /// The CR after the data.
    DataEnd,
    /// The LF after that.
    DataEnded,
    /// A trailer, or the CR of the end; bytes of trailers so far.
    Trailers(u16),
    /// A trailer; bytes of trailers so far.
    Trailer(u16),
    /// The LF after a trailer.
    TrailerEnd(u16),
    /// The last LF.
    Last,
    /// Nothing more.
    Done,
}

impl Chunks {
    /// Nothing of the body has come.
    pub const START: Self = Self::Size(0, 0);

    /// Follows the body through `bytes`; how many of them belong to it.
    ///
    /// # Errors
    /// The bytes are no chunks, or not ones that every reader cuts alike.
    pub fn follow(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let mut at = 0;
        while at < bytes.len() && *self != Self::Done {
            if let Self::Data(left) = self {
                let here = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= here as u64;
                at += here;
                if *left == 0 {
                    *self = Self::DataEnd;
                }
            } else {
                *self = self.after(bytes[at]).ok_or(Malformed)?;
                at += 1;
            }
        }
        Ok(at)
    }

    /// What comes after `byte`.
    fn after(self, byte: u8) -> Option<Self> {
        let is_text = byte == b'\t' || (byte >= b' ' && byte != 0x7f);
        Some(match (self, byte) {
            (Self::Size(1.., size), b'\r') => Self::SizeEnd(size),
            (Self::Size(1.., size), b';') => Self::Extension(0, size),
            (Self::Size(digits @ ..DIGITS_LIMIT, size), _) => {
                Self::Size(digits + 1, size * 16 + u64::from(char::from(byte).to_digit(16)?))
            }
            (Self::Extension(_, size), b'\r') => Self::SizeEnd(size),
            (Self::Extension(length @ ..LINE_LIMIT, size), _) if is_text => Self::Extension(length + 1, size),
            (Self::SizeEnd(0), b'\n') => Self::Trailers(0),
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataEnd, b'\r') => Self::DataEnded,
            (Self::DataEnded, b'\n') => Self::START,
            (Self::Trailers(_), b'\r') => Self::Last,
            (Self::Trailers(length @ ..TRAILERS_LIMIT), _) if byte.is_ascii_graphic() && byte != b':' => {
                Self::Trailer(length + 1)
            }
            (Self::Trailer(length), b'\r') => Self::TrailerEnd(length),
            (Self::Trailer(length @ ..TRAILERS_LIMIT), _) if is_text => Self::Trailer(length + 1),
            (Self::TrailerEnd(length), b'\n') => Self::Trailers(length),
            (Self::Last, b'\n') => Self::Done,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follow(bytes: &[u8]) -> Result<(usize, Chunks), Malformed> {
        let mut chunks = Chunks::START;
        chunks.follow(bytes).map(|length| (length, chunks))
    }

    #[test]
    fn the_end_is_found_wherever_the_network_cut_the_body() {
        let body = b"5\r\nhello\r\n0A;a=\"b\"\r\n0123456789\r\n0\r\na: b\r\n\r\n";
        let bytes = [&body[..], b"GET / HTTP/1.1\r\n"].concat();
        assert_eq!(follow(&bytes), Ok((body.len(), Chunks::Done)));
        for cut in 0..body.len() {
            let mut chunks = Chunks::START;
            assert_eq!(chunks.follow(&bytes[..cut]), Ok(cut));
            assert!(chunks != Chunks::Done);
            assert_eq!(chunks.follow(&bytes[cut..]), Ok(body.len() - cut), "{cut}");
            assert_eq!(chunks, Chunks::Done);
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_malformed() {
        let long = format!("1;{}\r\n", "a".repeat(2000));
        let trailers = format!("0\r\n{}", "a: b\r\n".repeat(2000));
        for bytes in [
            "\r\n",
            ";a\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            "1 \r\n",
            " 1\r\n",
            "1\nx",
            "1\r\rx",
            "1;a\nb\r\n",
            "1;\0\r\n",
            "1\r\nxy",
            "1\r\nx\n",
            "g\r\n",
            "1000000000000000\r\n",
            "0\r\n\n",
            "0\r\n a\r\n",
            "0\r\n:",
            "0\r\na\nb",
            &long,
            &trailers,
        ] {
            assert!(follow(bytes.as_bytes()).is_err(), "{:?}", bytes.chars().take(40).collect::<String>());
        }
    }
}
