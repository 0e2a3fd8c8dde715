//! Digests by which logits are compared.

/// BLAKE3 of logits as little-endian f32.
pub(crate) fn of_logits(logits: &[f32]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = [0u8; 4 * FEW];
    for few in logits.chunks(FEW) {
        for (to, logit) in bytes.chunks_exact_mut(4).zip(few) {
            to.copy_from_slice(&logit.to_le_bytes());
        }
        hasher.update(&bytes[..4 * few.len()]);
    }
    hasher.finalize()
}

/// Logits that are turned into bytes at once.
const FEW: usize = 4096;

/// A digest of digests: one word for a whole run.
pub(crate) fn of_all<'a>(digests: impl IntoIterator<Item = &'a blake3::Hash>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for digest in digests {
        hasher.update(digest.as_bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_are_little_endian_however_many_there_are() {
        for n in [0, 1, FEW - 1, FEW, FEW + 1, 3 * FEW + 7] {
            let logits: Vec<f32> = (0..n).map(|i| i as f32 - 0.5).collect();
            let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(of_logits(&logits), blake3::hash(&bytes), "{n}");
        }
    }
}
