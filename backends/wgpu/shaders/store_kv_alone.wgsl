fn stored(at: u32, i: u32, row: u32, key: bool) -> u32 {
    return work[at + i];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < words_of_row() {
        store(id.x, id.z);
    }
}
