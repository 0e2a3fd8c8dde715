// StoreKv (section 4 of the contract): a thread stores one word of a key and of a value.

const KEY: u32 = 6u;
const VALUES: u32 = 7u;
const STEP: u32 = 8u;

// Elements as a word of the cache; keys are turned on their way, if they are not yet.
fn pack(at: u32, i: u32, row: u32, key: bool) -> u32 {
    if param(CACHE_F32) != 0u {
        let x = stored(at, i, row, key);
        if !is_finite(x) {
            non_finite(param(STEP));
        }
        return x;
    }
    var out = 0u;
    for (var k = 0u; k < 2u; k++) {
        if 2u * i + k < param(KV_HEAD_DIM) {
            let h = f32_to_f16(stored(at, 2u * i + k, row, key));
            if h == 0xffffffffu {
                non_finite(param(STEP));
            }
            out |= (h & 0xffffu) << (16u * k);
        }
    }
    return out;
}

fn store(thread: u32, z: u32) {
    let words = position_words();
    let head = thread / words;
    let i = thread % words;
    let vector = (z * param(KV_HEADS) + head) * param(KV_HEAD_DIM);
    let row = cache_row(row_sequence(z), head, row_position(z)) + i;
    cache[row] = pack(param(KEY) + vector, i, z, true);
    cache[param(VALUES_AT) + row] = pack(param(VALUES) + vector, i, z, false);
}

fn words_of_row() -> u32 {
    return position_words() * param(KV_HEADS);
}
