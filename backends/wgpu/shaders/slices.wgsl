// Slices of a segment as encodings have them that name no other: slice k is block k of 32 weights, word by word.

fn slice_codes(b: u32, k: u32) -> Codes {
    let n = 8u * k;
    let low = vec4<u32>(codes_at(b, n), codes_at(b, n + 1u), codes_at(b, n + 2u), codes_at(b, n + 3u));
    let high = vec4<u32>(codes_at(b, n + 4u), codes_at(b, n + 5u), codes_at(b, n + 6u), codes_at(b, n + 7u));
    return Codes(low, high);
}
