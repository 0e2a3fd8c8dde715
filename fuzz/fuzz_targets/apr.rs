#![no_main]

use apr_format::v2::{AprV2Header, HEADER_SIZE_V2};

// Mutations break both checksums at once and would never get past them, so they are put right, one after the other.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some(head) = bytes.get(..HEADER_SIZE_V2) else {
        return hoist_fuzz::check("model.apr", bytes);
    };
    let mut bytes = bytes.to_vec();
    if let Ok(mut header) = AprV2Header::from_bytes(head) {
        header.update_checksum();
        bytes[..HEADER_SIZE_V2].copy_from_slice(&header.to_bytes());
    }
    hoist_fuzz::check("model.apr", &bytes);
    if let Some(end) = bytes.len().checked_sub(4).filter(|&end| end >= HEADER_SIZE_V2) {
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        hoist_fuzz::check("model.apr", &bytes);
    }
});
