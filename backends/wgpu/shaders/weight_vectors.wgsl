// Rows and blocks start at multiples of sixteen bytes.
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;

fn weight_word(i: u32) -> u32 {
    return weights[i >> 2u][i & 3u];
}

fn weight_vector(i: u32) -> vec4<u32> {
    return weights[i];
}
