//! The search for one of two bytes, which is most of what reading JSON and event streams costs.
//!
//! Prompts are tens of kilobytes in which a quote, a backslash or a line end comes every hundred bytes or so,
//! and every byte is looked at once per pass. The standard library searches for several bytes one at a time.
//! This skips 32 bytes per step in a loop without branches, which the compiler turns into vector
//! instructions, and finds the place within the step without branches too: text is irregular, and a
//! mispredicted branch costs more than all the arithmetic here. Bytes are compared eight at a time in a word,
//! by Mycroft's test for a zero byte.

/// Bytes skipped per step: two vectors on any x86-64, one where AVX2 may be used.
const STEP: usize = 32;
/// The lowest and the highest bit of each byte of a word.
const LOW: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

/// The position of the first byte of `text` that equals `a` or `b`.
#[inline]
pub(super) fn find_either(text: &[u8], a: u8, b: u8) -> Option<usize> {
    let (steps, last) = text.as_chunks::<STEP>();
    for (index, step) in steps.iter().enumerate() {
        if step.iter().fold(0, |any, &byte| any | u8::from(byte == a) | u8::from(byte == b)) != 0 {
            let words = step.as_chunks::<8>().0.iter().rev();
            let mask = words.fold(0_u32, |mask, word| mask << 8 | u32::from(matches(*word, a, b)));
            return Some(index * STEP + mask.trailing_zeros() as usize);
        }
    }
    let position = last.iter().position(|&byte| byte == a || byte == b)?;
    Some(steps.len() * STEP + position)
}

/// One bit per byte of `word`, of which the lowest set one is the first byte that equals `a` or `b`; bits
/// above it may be wrong, because the subtraction borrows.
#[inline]
fn matches(word: [u8; 8], a: u8, b: u8) -> u8 {
    let word = u64::from_le_bytes(word);
    let zeros = |word: u64| word.wrapping_sub(LOW) & !word & HIGH;
    let marks = zeros(word ^ (LOW * u64::from(a))) | zeros(word ^ (LOW * u64::from(b)));
    // Gathers the eight high bits in the topmost byte.
    ((marks >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_two_bytes_is_found_at_every_position() {
        for length in 0..100 {
            for at in 0..length {
                let mut text = vec![b'.'; length];
                text[length - 1] = b'"';
                text[at] = b'\\';
                assert_eq!(find_either(&text, b'"', b'\\'), Some(at), "length {length}");
            }
            assert_eq!(find_either(&vec![b'.'; length], b'"', b'\\'), None);
        }
    }

    #[test]
    fn random_bytes_are_searched_as_by_the_standard_library() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let near = rng.u8(..);
            let text: Vec<u8> = (0..rng.usize(0..90)).map(|_| near.wrapping_add(rng.u8(0..5))).collect();
            let (a, b) = (near.wrapping_add(rng.u8(0..7)), near.wrapping_add(rng.u8(0..7)));
            let want = text.iter().position(|&byte| byte == a || byte == b);
            assert_eq!(find_either(&text, a, b), want, "{a} or {b} in {text:?}");
        }
    }
}
