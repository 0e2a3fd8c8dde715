// StoreKv (section 4 of the contract): a thread stores one word of a key and of a value.

const KEY: u32 = 0u;
const VALUE: u32 = 1u;
const STEP: u32 = 2u;

fn pack(at: u32, i: u32) -> u32 {
    if param(CACHE_F32) != 0u {
        let x = work[at + i];
        if !is_finite(x) {
            non_finite(param(STEP));
        }
        return x;
    }
    var out = 0u;
    for (var k = 0u; k < 2u; k++) {
        if 2u * i + k < param(HEAD_DIM) {
            let h = f32_to_f16(work[at + 2u * i + k]);
            if h == 0xffffffffu {
                non_finite(param(STEP));
            }
            out |= (h & 0xffffu) << (16u * k);
        }
    }
    return out;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let words = position_words();
    if id.x >= words * param(KV_HEADS) {
        return;
    }
    let head = id.x / words;
    let i = id.x % words;
    let vector = (id.z * param(KV_HEADS) + head) * param(HEAD_DIM);
    let row = cache_row(row_sequence(id.z), head, row_position(id.z)) + i;
    cache[row] = pack(param(KEY) + vector, i);
    cache[param(VALUES_AT) + row] = pack(param(VALUE) + vector, i);
}
