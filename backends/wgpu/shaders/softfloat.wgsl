// IEEE 754 binary32 in integers: round to nearest even, subnormals, one rounding an operation. WGSL lets a driver fuse,
// reorder and flush its own f32 operations, so none is used.

const QUIET_NAN: u32 = 0x7fc00000u;
const INFINITY: u32 = 0x7f800000u;
const SIGN: u32 = 0x80000000u;
const MAGNITUDE: u32 = 0x7fffffffu;
const ONE: u32 = 0x3f800000u;

// A 64-bit integer: x is the low word.
fn add64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn sub64(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

// Shifts right by n < 64, rounding down (the arithmetic shift of a signed integer).
fn sar64(a: vec2<u32>, n: u32) -> vec2<u32> {
    let high = bitcast<i32>(a.y);
    if n >= 32u {
        return vec2<u32>(bitcast<u32>(high >> (n - 32u)), bitcast<u32>(high >> 31u));
    }
    // Two shifts, since a shift by 32 is none.
    let low = (a.x >> n) | ((a.y << 1u) << (31u - n));
    return vec2<u32>(low, bitcast<u32>(high >> n));
}

// The 64-bit product of two signed integers.
fn mul_wide(a: i32, b: i32) -> vec2<u32> {
    let ua = bitcast<u32>(a);
    let ub = bitcast<u32>(b);
    let al = ua & 0xffffu;
    let ah = ua >> 16u;
    let bl = ub & 0xffffu;
    let bh = ub >> 16u;
    let ll = al * bl;
    let m1 = ah * bl + (ll >> 16u);
    let m2 = al * bh + (m1 & 0xffffu);
    let low = (m2 << 16u) | (ll & 0xffffu);
    var high = ah * bh + (m1 >> 16u) + (m2 >> 16u);
    high -= select(0u, ub, a < 0) + select(0u, ua, b < 0);
    return vec2<u32>(low, high);
}

// A signed 64-bit integer times a factor below 2^16, modulo 2^64.
fn mul_small(a: vec2<u32>, m: u32) -> vec2<u32> {
    let l0 = (a.x & 0xffffu) * m;
    let l1 = (a.x >> 16u) * m + (l0 >> 16u);
    return vec2<u32>((l1 << 16u) | (l0 & 0xffffu), a.y * m + (l1 >> 16u));
}

// Shifts right; what falls off leaves its trace in the lowest bit.
fn jam(x: u32, n: u32) -> u32 {
    if n == 0u {
        return x;
    }
    if n >= 32u {
        return min(x, 1u);
    }
    return (x >> n) | min(x << (32u - n), 1u);
}

fn jam64(x: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return x;
    }
    if n >= 64u {
        return vec2<u32>(min(x.x | x.y, 1u), 0u);
    }
    if n >= 32u {
        let lost = x.x | ((x.y << 1u) << (63u - n));
        return vec2<u32>((x.y >> (n - 32u)) | min(lost, 1u), 0u);
    }
    let low = (x.x >> n) | (x.y << (32u - n)) | min(x.x << (32u - n), 1u);
    return vec2<u32>(low, x.y >> n);
}

// Rounds and packs: bit 30 of `sig` is set and stands for 2^(exponent - 127); seven bits are rounded off.
fn round_pack(sign: u32, exponent: i32, sig: u32) -> u32 {
    if exponent >= 255 {
        return sign | INFINITY;
    }
    var s = sig;
    var e = exponent - 1;
    if exponent <= 0 {
        s = jam(s, u32(min(1 - exponent, 31)));
        e = 0;
    }
    let rounded = (s + 63u + ((s >> 7u) & 1u)) >> 7u;
    // The leading one adds itself to the exponent.
    return sign | ((u32(e) << 23u) + rounded);
}

struct Unpacked {
    e: i32,
    m: u32,
}

// A finite number other than zero: 24-bit significand, its leading bit set.
fn unpack(x: u32) -> Unpacked {
    let e = (x >> 23u) & 255u;
    let m = x & 0x7fffffu;
    if e == 0u {
        let n = countLeadingZeros(m) - 8u;
        return Unpacked(1 - i32(n), m << n);
    }
    return Unpacked(i32(e), m | 0x800000u);
}

fn is_finite(x: u32) -> bool {
    return (x & INFINITY) != INFINITY;
}

fn is_nan(x: u32) -> bool {
    return (x & MAGNITUDE) > INFINITY;
}

fn f_neg(x: u32) -> u32 {
    return x ^ SIGN;
}

// a + b where one of them is infinite or no number.
fn add_special(a: u32, b: u32) -> u32 {
    if is_nan(a) || is_nan(b) {
        return QUIET_NAN;
    }
    if !is_finite(a) {
        return select(a, QUIET_NAN, !is_finite(b) && a != b);
    }
    return b;
}

// a * b where one of them is infinite or no number.
fn mul_special(a: u32, b: u32) -> u32 {
    if is_nan(a) || is_nan(b) || (a & MAGNITUDE) == 0u || (b & MAGNITUDE) == 0u {
        return QUIET_NAN;
    }
    return ((a ^ b) & SIGN) | INFINITY;
}

fn f_add(a: u32, b: u32) -> u32 {
    if !is_finite(a) || !is_finite(b) {
        return add_special(a, b);
    }
    let swapped = (a & MAGNITUDE) < (b & MAGNITUDE);
    let big = select(a, b, swapped);
    let small = select(b, a, swapped);
    let e_big = (big >> 23u) & 255u;
    let e_small = (small >> 23u) & 255u;
    let m_big = ((big & 0x7fffffu) | select(0x800000u, 0u, e_big == 0u)) << 6u;
    let m_small = ((small & 0x7fffffu) | select(0x800000u, 0u, e_small == 0u)) << 6u;
    let e = max(e_big, 1u);
    let aligned = jam(m_small, e - max(e_small, 1u));
    let equal_signs = ((a ^ b) & SIGN) == 0u;
    let sum = select(m_big - aligned, m_big + aligned, equal_signs);
    if sum == 0u {
        return select(0u, a & SIGN, equal_signs);
    }
    let n = countLeadingZeros(sum) - 1u;
    return round_pack(big & SIGN, i32(e) + 1 - i32(n), sum << n);
}

fn f_sub(a: u32, b: u32) -> u32 {
    return f_add(a, b ^ SIGN);
}

// The 48-bit product of two 24-bit significands, shifted left by 15: bit 62 or bit 61 leads.
fn product(a: u32, b: u32) -> vec2<u32> {
    let al = a & 0xfffu;
    let ah = a >> 12u;
    let bl = b & 0xfffu;
    let bh = b >> 12u;
    let ll = al * bl;
    let t = ah * bl + al * bh + (ll >> 12u);
    let low = ((t & 31u) << 12u) | (ll & 0xfffu);
    return vec2<u32>(low << 15u, ((ah * bh) << 7u) + (t >> 5u));
}

fn f_mul(a: u32, b: u32) -> u32 {
    if !is_finite(a) || !is_finite(b) {
        return mul_special(a, b);
    }
    let sign = (a ^ b) & SIGN;
    if (a & MAGNITUDE) == 0u || (b & MAGNITUDE) == 0u {
        return sign;
    }
    let x = unpack(a);
    let y = unpack(b);
    let p = product(x.m, y.m);
    let sig = p.y | min(p.x, 1u);
    let short = 1u - (p.y >> 30u);
    return round_pack(sign, x.e + y.e - 126 - i32(short), sig << short);
}

// a * b + c with one rounding.
fn f_fma(a: u32, b: u32, c: u32) -> u32 {
    if !is_finite(a) || !is_finite(b) {
        return add_special(mul_special(a, b), c);
    }
    if !is_finite(c) {
        return select(c, QUIET_NAN, is_nan(c));
    }
    let sign = (a ^ b) & SIGN;
    if (a & MAGNITUDE) == 0u || (b & MAGNITUDE) == 0u {
        if (c & MAGNITUDE) != 0u {
            return c;
        }
        return select(0u, sign, sign == c);
    }
    let x = unpack(a);
    let y = unpack(b);
    var p = product(x.m, y.m);
    // What bit 62 stands for.
    let e_p = x.e + y.e - 126;
    let e_c0 = (c >> 23u) & 255u;
    var q = vec2<u32>(0u, ((c & 0x7fffffu) | select(0x800000u, 0u, e_c0 == 0u)) << 7u);
    let e_c = i32(max(e_c0, 1u));
    let e = max(e_p, e_c);
    p = jam64(p, u32(e - e_p));
    q = jam64(q, u32(e - e_c));
    var out_sign = sign;
    var sum: vec2<u32>;
    if sign == (c & SIGN) {
        sum = add64(p, q);
    } else {
        let less = p.y < q.y || (p.y == q.y && p.x < q.x);
        if less {
            sum = sub64(q, p);
            out_sign = c & SIGN;
        } else {
            sum = sub64(p, q);
        }
        if (sum.x | sum.y) == 0u {
            return 0u;
        }
    }
    var n = 0u;
    if sum.y == 0u {
        sum = vec2<u32>(0u, sum.x);
        n = 32u;
    }
    let k = countLeadingZeros(sum.y);
    // Two shifts, since a shift by 32 is none.
    let high = (sum.y << k) | ((sum.x >> 1u) >> (31u - k));
    let rest = (sum.x << k) | (high & 1u);
    n += k;
    return round_pack(out_sign, e + 1 - i32(n), (high >> 1u) | min(rest, 1u));
}

fn f_div(a: u32, b: u32) -> u32 {
    let sign = (a ^ b) & SIGN;
    if is_nan(a) || is_nan(b) {
        return QUIET_NAN;
    }
    if !is_finite(a) {
        return select(sign | INFINITY, QUIET_NAN, !is_finite(b));
    }
    if !is_finite(b) {
        return sign;
    }
    if (b & MAGNITUDE) == 0u {
        return select(sign | INFINITY, QUIET_NAN, (a & MAGNITUDE) == 0u);
    }
    if (a & MAGNITUDE) == 0u {
        return sign;
    }
    let x = unpack(a);
    let y = unpack(b);
    let short = select(0u, 1u, x.m < y.m);
    var rest = (x.m << short) - y.m;
    // The quotient is in 1 … 2: its leading one, and thirty more bits.
    var quotient = 1u;
    for (var i = 0; i < 3; i++) {
        let t = rest << 8u;
        quotient = (quotient << 8u) | (t / y.m);
        rest = t % y.m;
    }
    let t = rest << 6u;
    quotient = (quotient << 6u) | (t / y.m);
    rest = t % y.m;
    return round_pack(sign, x.e - y.e + 127 - i32(short), quotient | min(rest, 1u));
}

fn f_sqrt(a: u32) -> u32 {
    if (a & MAGNITUDE) == 0u {
        return a;
    }
    if (a & SIGN) != 0u || is_nan(a) {
        return QUIET_NAN;
    }
    if !is_finite(a) {
        return a;
    }
    let x = unpack(a);
    // The value is m * 2^(e - 150): 26 bits of the root of m * 2^27 (e odd) or m * 2^28, whose exponents are even.
    let odd = u32(x.e & 1);
    // The radicand has 52 bits; these are the upper 32 of them.
    var high = x.m << (8u - odd);
    var rest = 0u;
    var root = 0u;
    for (var i = 0; i < 26; i++) {
        rest = (rest << 2u) | (high >> 30u);
        high = high << 2u;
        let trial = (root << 2u) | 1u;
        root = root << 1u;
        if rest >= trial {
            rest -= trial;
            root |= 1u;
        }
    }
    let e = (x.e - 127 - (1 - i32(odd))) / 2 + 127;
    return round_pack(0u, e, (root << 5u) | min(rest, 1u));
}

// An integer below 2^24 in magnitude, exactly.
fn f_from_int(i: i32) -> u32 {
    if i == 0 {
        return 0u;
    }
    let magnitude = u32(abs(i));
    let n = countLeadingZeros(magnitude);
    return (bitcast<u32>(i) & SIGN) | (((157u - n) << 23u) + ((magnitude << n) >> 8u));
}

// 2^e for exponents of normal numbers.
fn f_exp2(e: i32) -> u32 {
    return u32(e + 127) << 23u;
}

fn f16_to_f32(h: u32) -> u32 {
    let sign = (h & 0x8000u) << 16u;
    let magnitude = h & 0x7fffu;
    if magnitude >= 0x400u {
        return sign | ((magnitude << 13u) + select(0x38000000u, 0x70000000u, magnitude >= 0x7c00u));
    }
    return sign | f_from_int_exp(magnitude, -24);
}

// m * 2^e for m below 2^24, where the result is zero or normal.
fn f_from_int_exp(m: u32, e: i32) -> u32 {
    if m == 0u {
        return 0u;
    }
    return f_from_int(i32(m)) + (u32(e) << 23u);
}

// To f16, round to nearest even; 0xffffffff if that is infinite or no number.
fn f32_to_f16(x: u32) -> u32 {
    let sign = (x >> 16u) & 0x8000u;
    let magnitude = x & MAGNITUDE;
    if magnitude >= 0x477ff000u {
        return 0xffffffffu;
    }
    if magnitude >= 0x38800000u {
        let rounded = magnitude + 0xfffu + ((magnitude >> 13u) & 1u);
        return sign | ((rounded - 0x38000000u) >> 13u);
    }
    let e = magnitude >> 23u;
    if e < 101u {
        return sign;
    }
    let m = ((magnitude & 0x7fffffu) | 0x800000u) << 2u;
    let s = jam(m, 126u - e);
    return sign | ((s + 1u + ((s >> 2u) & 1u)) >> 2u);
}

fn f_polynomial(x: u32, a: u32, b: u32, c: u32, d: u32, e: u32) -> u32 {
    var terms = array<u32, 4>(b, c, d, e);
    var y = a;
    for (var i = 0; i < 4; i++) {
        y = f_fma(y, x, terms[i]);
    }
    return y;
}

// a < b for numbers of which neither is NaN.
fn f_key(x: u32) -> u32 {
    return select(x | SIGN, ~x, (x & SIGN) != 0u);
}

fn f_exp(argument: u32) -> u32 {
    if is_nan(argument) {
        return QUIET_NAN;
    }
    var x = argument;
    if f_key(x) < f_key(0xc2d00000u) {
        x = 0xc2d00000u;
    }
    if f_key(x) > f_key(0x42b17217u) {
        x = 0x42b17217u;
    }
    let rounded = f_fma(x, 0x3fb8aa3bu, 0x4b400000u);
    let n_float = f_add(rounded, 0xcb400000u);
    var r = f_fma(n_float, 0xbf317218u, x);
    r = f_fma(n_float, 0x3102e308u, r);
    let p = f_polynomial(r, 0x3ab511a9u, 0x3c091d36u, 0x3d2aac7au, 0x3e2aaa48u, 0x3efffffeu);
    let y = f_add(f_fma(f_mul(r, r), p, r), ONE);
    let n = bitcast<i32>(rounded) - 0x4b400000;
    let half = n >> 1u;
    return f_mul(f_mul(y, f_exp2(half)), f_exp2(n - half));
}

fn f_tanh(x: u32) -> u32 {
    let a = x & MAGNITUDE;
    var t: u32;
    if a < 0x3f200000u {
        let z = f_mul(a, a);
        let q = f_polynomial(z, 0xbbb70d0cu, 0x3ca8380fu, 0xbd5bfd48u, 0x3e08829eu, 0xbeaaaa95u);
        t = f_fma(f_mul(a, z), q, a);
    } else {
        let e = f_add(f_exp(f_add(a, a)), ONE);
        t = f_sub(ONE, f_div(0x40000000u, e));
    }
    return (t & MAGNITUDE) | (x & SIGN);
}

fn f_soft_cap(x: u32, cap: u32) -> u32 {
    return f_mul(cap, f_tanh(f_div(x, cap)));
}

// x / (1 + exp(-u))
fn f_gate(x: u32, u: u32) -> u32 {
    return f_div(x, f_add(ONE, f_exp(f_neg(u))));
}

fn f_silu(x: u32) -> u32 {
    return f_gate(x, x);
}

fn f_gelu_tanh(x: u32) -> u32 {
    return f_gate(x, f_mul(x, f_fma(f_mul(x, x), 0x3d922279u, 0x3fcc422au)));
}

// An exact sum as f32, times 2^exponent: rounded, scaled, rounded once more.
fn f_finish(acc: vec2<u32>, exponent: i32) -> u32 {
    if (acc.x | acc.y) == 0u {
        return 0u;
    }
    let sign = acc.y & SIGN;
    var m = acc;
    if sign != 0u {
        m = sub64(vec2<u32>(0u, 0u), acc);
    }
    var n = 0u;
    if m.y == 0u {
        m = vec2<u32>(0u, m.x);
        n = 32u;
    }
    let k = countLeadingZeros(m.y);
    let high = (m.y << k) | ((m.x >> 1u) >> (31u - k));
    let rest = m.x << k;
    n += k;
    // Bit 63 leads and stands for 2^(63 - n).
    let sig = (high >> 1u) | min(rest | (high & 1u), 1u);
    let rounded = (sig + 63u + ((sig >> 7u) & 1u)) >> 7u;
    // 24 bits, or 2^24 after a carry.
    let carry = rounded >> 24u;
    return round_pack(sign, 63 - i32(n) + i32(carry) + 127 + exponent, (rounded >> carry) << 7u);
}
