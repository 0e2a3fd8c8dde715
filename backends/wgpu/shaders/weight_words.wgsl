@group(0) @binding(3) var<storage, read> weights: array<u32>;

fn weight_word(i: u32) -> u32 {
    return weights[i];
}
