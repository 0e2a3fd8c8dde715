// Q1_0: f16 scale; 128 sign bits, lowest first: 1 is plus.

fn block_codes(b: u32, n: u32) -> u32 {
    let four = (byte_at(b + 2u + (n >> 1u)) >> (4u * (n & 1u))) & 15u;
    return less(spread(four) << 1u, 0x01010101u);
}
