@group(0) @binding(2) var<storage, read_write> work: array<u32>;

fn work_word(i: u32) -> u32 {
    return work[i];
}

fn set_word(i: u32, x: u32) {
    work[i] = x;
}
