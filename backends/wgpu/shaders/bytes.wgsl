// Bytes of `weights` at byte addresses.

fn byte_at(at: u32) -> u32 {
    return (weight_word(at >> 2u) >> ((at & 3u) * 8u)) & 255u;
}

// At an even address.
fn half_at(at: u32) -> u32 {
    return (weight_word(at >> 2u) >> ((at & 2u) * 8u)) & 0xffffu;
}

fn unaligned_at(at: u32) -> u32 {
    let s = (at & 3u) * 8u;
    // Two shifts, since a shift by 32 is none.
    return (weight_word(at >> 2u) >> s) | ((weight_word((at + 3u) >> 2u) << 1u) << (31u - s));
}

fn aligned_at(at: u32) -> u32 {
    return weight_word(at >> 2u);
}

fn nibbles(word: u32, high: u32) -> u32 {
    return (word >> (4u * high)) & 0x0f0f0f0fu;
}

fn pairs(word: u32, which: u32) -> u32 {
    return (word >> (2u * which)) & 0x03030303u;
}

fn bits(word: u32, which: u32) -> u32 {
    return (word >> which) & 0x01010101u;
}

// Four bits to the lowest bits of four bytes.
fn spread(four: u32) -> u32 {
    return (four & 1u) | ((four & 2u) << 7u) | ((four & 4u) << 14u) | ((four & 8u) << 21u);
}

// Subtracts `zero` (in each byte, at most 128) from four bytes below 128.
fn less(codes: u32, zero: u32) -> u32 {
    return ((codes | 0x80808080u) - zero) ^ 0x80808080u;
}

// Four bytes of a code book of sixteen, by four nibbles.
fn look_up(book: vec4<u32>, four: u32) -> u32 {
    var out = 0u;
    for (var i = 0u; i < 4u; i++) {
        let at = (four >> (8u * i)) & 15u;
        let low = select(book.x, book.y, (at & 4u) != 0u);
        let high = select(book.z, book.w, (at & 4u) != 0u);
        let word = select(low, high, (at & 8u) != 0u);
        out |= ((word >> ((at & 3u) * 8u)) & 255u) << (8u * i);
    }
    return out;
}

// `kvalues_iq4nl` of ggml, as four i8 a word.
fn iq4_levels(four: u32) -> u32 {
    return look_up(vec4<u32>(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u), four);
}

// E2M1 values times two.
fn e2m1(four: u32) -> u32 {
    return look_up(vec4<u32>(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu), four);
}

// Negates those of four bytes between 1 and 127 whose bits are set.
fn negate(levels: u32, four: u32) -> u32 {
    let chosen = spread(four);
    return (levels ^ (chosen * 255u)) + chosen;
}

// Eight sign bits from seven: the eighth makes their number even.
fn even_signs(seven: u32) -> u32 {
    let s = seven & 127u;
    return s | ((countOneBits(s) & 1u) << 7u);
}

// Four sign bits of eight: the low ones for even words of weights.
fn four_signs(signs: u32, n: u32) -> u32 {
    return (signs >> (4u * (n & 1u))) & 15u;
}

// 2s + 1 of the 4-bit scale `i` among nibbles at `at`, low ones first.
fn odd_nibble(at: u32, i: u32) -> i32 {
    return i32((byte_at(at + (i >> 1u)) >> (4u * (i & 1u))) & 15u) * 2 + 1;
}

// 8 * grid + 1 or - 1, in each byte.
fn offset_eighth(levels: u32, negative: bool) -> u32 {
    let biased = levels ^ 0x80808080u;
    return select(biased + 0x01010101u, biased - 0x01010101u, negative) ^ 0x80808080u;
}

struct Scale {
    m: i32,
    e: i32,
}

// An f16 as m * 2^e.
fn f16_scale(bits: u32) -> Scale {
    let exponent = (bits >> 10u) & 31u;
    let fraction = i32((bits & 0x3ffu) | select(0x400u, 0u, exponent == 0u));
    return Scale(select(fraction, -fraction, (bits & 0x8000u) != 0u), i32(max(exponent, 1u)) - 25);
}

// Sixteen weights, and sixteen more.
struct Codes {
    low: vec4<u32>,
    high: vec4<u32>,
}

// Four words from an even address on.
fn four_at(at: u32) -> vec4<u32> {
    let s = (at & 3u) * 8u;
    let i = at >> 2u;
    let a = weight_word(i);
    let b = weight_word(i + 1u);
    let c = weight_word(i + 2u);
    let d = weight_word(i + 3u);
    let e = weight_word((at + 15u) >> 2u);
    let low = vec4<u32>(a, b, c, d);
    let high = vec4<u32>(b, c, d, e);
    // Two shifts, since a shift by 32 is none.
    return (low >> vec4<u32>(s)) | ((high << vec4<u32>(1u)) << vec4<u32>(31u - s));
}

fn nibbles_of(words: vec4<u32>, high: u32) -> vec4<u32> {
    return (words >> vec4<u32>(4u * high)) & vec4<u32>(0x0f0f0f0fu);
}

fn less_of(codes: vec4<u32>, zero: u32) -> vec4<u32> {
    return ((codes | vec4<u32>(0x80808080u)) - vec4<u32>(zero)) ^ vec4<u32>(0x80808080u);
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}
