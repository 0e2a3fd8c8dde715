// A layer's keys and values: `[sequence][head][position][element]`, keys first. In f16 a word holds two elements, so that
// a position starts with a whole word; in f32 it holds one.

const CACHE_F32: u32 = 16u;
const CONTEXT: u32 = 17u;
const KV_HEADS: u32 = 18u;
const KV_HEAD_DIM: u32 = 19u;
// Words from the keys to the values.
const VALUES_AT: u32 = 20u;

fn position_words() -> u32 {
    return select((param(KV_HEAD_DIM) + 1u) / 2u, param(KV_HEAD_DIM), param(CACHE_F32) != 0u);
}

fn cache_row(sequence: u32, head: u32, position: u32) -> u32 {
    return ((sequence * param(KV_HEADS) + head) * param(CONTEXT) + position) * position_words();
}

fn cached(row: u32, i: u32) -> u32 {
    if param(CACHE_F32) != 0u {
        return cache[row + i];
    }
    return f16_to_f32((cache[row + (i >> 1u)] >> (16u * (i & 1u))) & 0xffffu);
}
