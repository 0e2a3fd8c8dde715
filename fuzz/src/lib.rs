//! What all targets check.

/// Opens `bytes`. Whatever they are, that must not panic; and what opening promises of a model must hold.
pub fn check(name: &str, bytes: &[u8]) {
    let Ok(manifest) = hoist_formats::open_bytes(name, bytes.into()) else {
        return;
    };
    let mut names = std::collections::HashSet::new();
    for tensor in &manifest.tensors {
        assert!(names.insert(&tensor.name), "{} is there twice", tensor.name);
        assert!(!tensor.shape.contains(&0), "{tensor:?}");
        let shard = &manifest.shards[tensor.shard as usize];
        let end = tensor.offset.checked_add(tensor.nbytes).expect("an end");
        assert!(
            end <= shard.source.len,
            "{tensor:?} ends in {} bytes",
            shard.source.len
        );
        let read = manifest
            .read_tensor(tensor, u64::MAX)
            .expect("bytes that are there");
        assert_eq!(read.len() as u64, tensor.nbytes);
    }
    manifest
        .verify_checksums()
        .expect("checksums that opening has seen");
}
