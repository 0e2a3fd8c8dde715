// Q8_0: f16 scale; 32 i8.

fn block_codes(b: u32, n: u32) -> u32 {
    return word_at(b + 2u + 4u * n);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let at = block_of(b, 32u * k) + 2u;
    return Codes(four_at(at), four_at(at + 16u));
}
