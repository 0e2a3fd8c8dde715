// Rope of queries and keys, and StoreKv: queries are turned in place, keys on their way to the cache.

fn stored(at: u32, i: u32, row: u32, key: bool) -> u32 {
    if !key || i >= param(N_ROT) {
        return work[at + i];
    }
    let pairs = param(N_ROT) / 2u;
    var j = i >> 1u;
    var second_of_pair = (i & 1u) != 0u;
    var other = i ^ 1u;
    if param(HALF_SPLIT) != 0u {
        second_of_pair = i >= pairs;
        j = select(i, i - pairs, second_of_pair);
        other = select(i + pairs, j, second_of_pair);
    }
    let angle = param(TABLE) + row_position(row) * param(N_ROT) + 2u * j;
    let c = tables[angle];
    let s = tables[angle + 1u];
    let x = work[at + i];
    let y = work[at + other];
    if second_of_pair {
        return f_fma(y, s, f_mul(x, c));
    }
    return f_fma(x, c, f_neg(f_mul(y, s)));
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let pairs = pairs_of_row();
    if id.x < pairs {
        turn(id.x, id.z);
    } else if id.x - pairs < words_of_row() {
        store(id.x - pairs, id.z);
    }
}
