//! Sixteen rows in plain code, for tests: what `avx512.rs` does, method by method, by what its instructions are documented to do.
//!
//! Few machines that run tests have AVX-512. Here the kernels of sixteen rows, whose dots are not narrow and whose signed weights are
//! raised by 128, run everywhere; where there is AVX-512, each method is compared with its own.

use half::f16;

use super::lanes::{Job, Lanes, Sums, Wide};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Portable;

type V = [u32; 16];
type F = [f32; 16];

fn each(f: impl FnMut(usize) -> u32) -> V {
    std::array::from_fn(f)
}

/// By the bytes of each word.
fn bytes(f: impl Fn(usize, usize) -> u8) -> V {
    each(|i| u32::from_le_bytes(std::array::from_fn(|b| f(i, b))))
}

fn byte(v: &V, i: usize, b: usize) -> u8 {
    v[i].to_le_bytes()[b]
}

/// By the i16 halves of each word.
fn halves(f: impl Fn(usize, usize) -> i16) -> V {
    each(|i| u32::from(f(i, 0) as u16) | u32::from(f(i, 1) as u16) << 16)
}

fn half(v: &V, i: usize, h: usize) -> i16 {
    (v[i] >> (16 * h)) as i16
}

/// Pairs of words as integers of 64 bits.
fn longs(f: impl Fn(usize) -> i64) -> V {
    each(|i| (f(i / 2) >> (32 * (i % 2))) as u32)
}

fn long(v: &V, i: usize) -> i64 {
    (u64::from(v[2 * i + 1]) << 32 | u64::from(v[2 * i])) as i64
}

/// The low halves of 64 bits, multiplied as signed ones.
fn product(a: &V, b: &V, i: usize) -> i64 {
    i64::from(a[2 * i] as i32) * i64::from(b[2 * i] as i32)
}

/// `VPDPBUSD`: four products of u8 and i8, added without saturation.
fn dpbusd(acc: V, w: V, q: u32) -> V {
    let q = q.to_le_bytes().map(|q| q as i8);
    each(|i| {
        let dot: i32 = (0..4).map(|b| i32::from(byte(&w, i, b)) * i32::from(q[b])).sum();
        acc[i].wrapping_add(dot as u32)
    })
}

impl Lanes for Portable {
    const ROWS: usize = 16;
    const NARROW: bool = false;
    type V = V;
    type F = F;

    fn vectorise<J: Job>(self, job: J) -> J::Output {
        job.run(self)
    }

    fn prefetch(self, _: &[u8]) {}

    fn load(self, bytes: &[u8]) -> V {
        assert_eq!(bytes.len(), 64);
        each(|i| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]))
    }

    fn store(self, v: V, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), 64);
        for (to, word) in bytes.chunks_exact_mut(4).zip(v) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn load_u8(self, bytes: &[u8]) -> V {
        assert_eq!(bytes.len(), 16);
        each(|i| bytes[i].into())
    }

    fn load_i16(self, bytes: &[u8]) -> V {
        assert_eq!(bytes.len(), 32);
        each(|i| i32::from(i16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) as u32)
    }

    fn load_f16(self, bytes: &[u8]) -> F {
        assert_eq!(bytes.len(), 32);
        std::array::from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32_const())
    }

    fn splat(self, word: u32) -> V {
        [word; 16]
    }

    fn and(self, a: V, b: V) -> V {
        each(|i| a[i] & b[i])
    }

    fn or(self, a: V, b: V) -> V {
        each(|i| a[i] | b[i])
    }

    fn shl<const N: u32>(self, a: V) -> V {
        each(|i| a[i].checked_shl(N).unwrap_or(0))
    }

    fn shr<const N: u32>(self, a: V) -> V {
        each(|i| a[i].checked_shr(N).unwrap_or(0))
    }

    fn add(self, a: V, b: V) -> V {
        each(|i| a[i].wrapping_add(b[i]))
    }

    fn sub(self, a: V, b: V) -> V {
        each(|i| a[i].wrapping_sub(b[i]))
    }

    fn min(self, a: V, b: V) -> V {
        each(|i| (a[i] as i32).min(b[i] as i32) as u32)
    }

    fn xor(self, a: V, b: V) -> V {
        each(|i| a[i] ^ b[i])
    }

    fn sub8(self, a: V, b: V) -> V {
        bytes(|i, k| byte(&a, i, k).wrapping_sub(byte(&b, i, k)))
    }

    fn shr_by(self, a: V, by: V) -> V {
        each(|i| a[i].checked_shr(by[i]).unwrap_or(0))
    }

    fn table(self, bytes: &[u8; 16]) -> V {
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| bytes[4 * i + b]));
        each(|i| word(i % 4))
    }

    /// `VPSHUFB`: within 16 bytes, and zero where the upper bit is set.
    fn look_up(self, table: V, at: V) -> V {
        bytes(|i, b| {
            let at = byte(&at, i, b);
            let place = usize::from(at & 15);
            if at < 128 {
                byte(&table, i / 4 * 4 + place / 4, place % 4)
            } else {
                0
            }
        })
    }

    fn gather<const N: usize>(self, table: &[u32; N], at: V) -> V {
        const { assert!(N.is_power_of_two()) };
        each(|i| table[at[i] as usize % N])
    }

    fn flip(self, w: V, signs: V) -> V {
        bytes(|i, b| {
            let w = byte(&w, i, b);
            if byte(&signs, i, b) < 128 {
                w
            } else {
                w.wrapping_neg()
            }
        })
    }

    fn mul16(self, a: V, b: V) -> V {
        halves(|i, h| half(&a, i, h).wrapping_mul(half(&b, i, h)))
    }

    fn madd16(self, a: V, b: V) -> V {
        let of = |i: usize, h: usize| i32::from(half(&a, i, h)) * i32::from(half(&b, i, h));
        each(|i| of(i, 0).wrapping_add(of(i, 1)) as u32)
    }

    fn pow2(self, e: V) -> F {
        std::array::from_fn(|i| f32::from_bits(e[i].wrapping_add(127) << 23))
    }

    fn negate(self, a: F) -> F {
        a.map(|x| f32::from_bits(x.to_bits() ^ 0x8000_0000))
    }

    fn mul_floor(self, a: F, b: F) -> V {
        each(|i| {
            let floor = (a[i] * b[i]).floor();
            let fits = (-2147483648.0..2147483648.0).contains(&floor);
            if fits { floor as i32 as u32 } else { 0x8000_0000 }
        })
    }

    fn dot(self, acc: V, w: V, q: u32) -> V {
        dpbusd(acc, w, q)
    }

    fn dot_add(self, a: V, b: V) -> V {
        self.add(a, b)
    }

    fn dot_end(self, acc: V, factor: V) -> V {
        each(|i| acc[i].wrapping_mul(factor[i]))
    }

    fn factor(self, twice: u32) -> V {
        [twice & 0xffff; 16]
    }

    fn sub_scale<const J: i32>(self, v: V) -> V {
        each(|i| byte(&v, i, J as usize).into())
    }

    fn signed_sub_scale<const J: i32>(self, v: V) -> V {
        each(|i| i32::from(byte(&v, i, J as usize) as i8) as u32)
    }

    fn times(self, sub_scale: V, twice: u32) -> V {
        self.madd16(sub_scale, [twice & 0xffff; 16])
    }

    fn pair<const J: i32>(self, v: V) -> V {
        halves(|i, h| byte(&v, i, J as usize + h).into())
    }

    fn signed_pair<const J: i32>(self, v: V) -> V {
        halves(|i, h| (byte(&v, i, J as usize + h) as i8).into())
    }

    fn prepare_signed(self, w: V) -> Wide<V> {
        let raised = self.xor(w, [0x8080_8080; 16]);
        Wide {
            even: raised,
            odd: raised,
        }
    }

    fn dot_signed(self, acc: V, w: Wide<V>, q: u32) -> V {
        dpbusd(acc, w.even, q)
    }

    fn dot_signed_end(self, acc: V, twice: u32, sum: i32) -> V {
        each(|i| {
            acc[i]
                .wrapping_mul(twice & 0xffff)
                .wrapping_sub((sum as u32) << 7)
        })
    }

    fn dot_signed_scaled(self, acc: V, sub_scale: V, twice: u32, us: i32) -> V {
        let dot = self.dot_signed_end(acc, twice, us);
        each(|i| dot[i].wrapping_mul(sub_scale[i]))
    }

    fn zero_wide(self) -> Wide<V> {
        Wide {
            even: [0; 16],
            odd: [0; 16],
        }
    }

    fn mul_add_wide(self, acc: Wide<V>, a: V, b: V) -> Wide<V> {
        let b = Wide {
            even: b,
            odd: self.odd(b),
        };
        self.mul_add_parted(acc, a, b)
    }

    fn odd(self, a: V) -> V {
        longs(|i| (long(&a, i) as u64 >> 32) as i64)
    }

    fn mul_add_parted(self, acc: Wide<V>, a: V, b: Wide<V>) -> Wide<V> {
        let odd = self.odd(a);
        Wide {
            even: longs(|i| long(&acc.even, i).wrapping_add(product(&a, &b.even, i))),
            odd: longs(|i| long(&acc.odd, i).wrapping_add(product(&odd, &b.odd, i))),
        }
    }

    fn mul_add_splat(self, acc: Wide<V>, a: i32, b: Wide<V>) -> Wide<V> {
        let a = [a as u32; 16];
        Wide {
            even: longs(|i| long(&acc.even, i).wrapping_add(product(&a, &b.even, i))),
            odd: longs(|i| long(&acc.odd, i).wrapping_add(product(&a, &b.odd, i))),
        }
    }

    fn add_wide(self, a: Wide<V>, b: Wide<V>) -> Wide<V> {
        Wide {
            even: longs(|i| long(&a.even, i).wrapping_add(long(&b.even, i))),
            odd: longs(|i| long(&a.odd, i).wrapping_add(long(&b.odd, i))),
        }
    }

    fn sub_wide(self, a: Wide<V>, b: Wide<V>) -> Wide<V> {
        Wide {
            even: longs(|i| long(&a.even, i).wrapping_sub(long(&b.even, i))),
            odd: longs(|i| long(&a.odd, i).wrapping_sub(long(&b.odd, i))),
        }
    }

    /// `VPSRAVQ`: by 64 and more, as by 63.
    fn shift_wide(self, a: Wide<V>, by: V) -> Wide<V> {
        Wide {
            even: longs(|i| long(&a.even, i) >> by[2 * i].min(63)),
            odd: longs(|i| long(&a.odd, i) >> by[2 * i + 1].min(63)),
        }
    }

    fn load_wide(self, sums: &Sums) -> Wide<V> {
        Wide {
            even: longs(|i| sums.0[i]),
            odd: longs(|i| sums.0[8 + i]),
        }
    }

    fn store_wide(self, a: Wide<V>, sums: &mut Sums) {
        for i in 0..8 {
            sums.0[i] = long(&a.even, i);
            sums.0[8 + i] = long(&a.odd, i);
        }
    }

    fn round(self, a: Wide<V>, exponents: V, y: &mut [f32]) -> bool {
        assert_eq!(y.len(), 16);
        for (i, y) in y.iter_mut().enumerate() {
            let sum = long(if i % 2 == 0 { &a.even } else { &a.odd }, i / 2);
            let power = f64::from_bits(u64::from(exponents[i].wrapping_add(1023)) << 52);
            *y = (f64::from(sum as f32) * power) as f32;
        }
        true
    }
}

/// Compares each method with another implementation's, of as many rows or of half as many.
mod twins {
    use std::io::Write as _;

    use super::*;
    use crate::kernels::{avx2::Avx2, avx512::Avx512};

    /// Numbers that look random, and extremes: xorshift64*.
    struct Random(u64);

    impl Random {
        fn word(&mut self) -> u32 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let x = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32;
            const EXTREMES: [u32; 8] = [
                0,
                0x7f7f_7f7f,
                0x8080_8080,
                0xffff_ffff,
                0x8000_8000,
                0x7fff_7fff,
                0x8000_0000,
                1,
            ];
            if x.is_multiple_of(5) {
                EXTREMES[(x >> 8) as usize % 8]
            } else {
                x
            }
        }

        fn words(&mut self) -> V {
            each(|_| self.word())
        }
    }

    /// What a method makes of words, as words of 16 rows; `L` may have half as many rows, and then runs twice.
    struct Ask<'a, M> {
        method: &'a M,
        words: &'a [V],
    }

    /// A method by which implementations are compared: some words of each row to one.
    trait Method {
        fn of<L: Lanes>(&self, l: L, words: &[L::V]) -> L::V;
    }

    impl<M: Method> Job for Ask<'_, M> {
        type Output = V;

        fn run<L: Lanes>(self, l: L) -> V {
            let mut out = [0; 16];
            let all: Vec<Vec<u8>> = self
                .words
                .iter()
                .map(|words| words.iter().flat_map(|w| w.to_le_bytes()).collect())
                .collect();
            for first in (0..16).step_by(L::ROWS) {
                let words: Vec<L::V> = all
                    .iter()
                    .map(|b| l.load(&b[4 * first..4 * (first + L::ROWS)]))
                    .collect();
                let mut bytes = vec![0; 4 * L::ROWS];
                l.store(self.method.of(l, &words), &mut bytes);
                for (to, from) in out[first..].iter_mut().zip(bytes.chunks_exact(4)) {
                    *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                }
            }
            out
        }
    }

    macro_rules! methods {
        ($($name:ident: |$l:ident, $w:ident| $body:expr;)*) => {
            $(
                #[allow(non_camel_case_types, reason = "named for the method it asks")]
                struct $name;
                impl Method for $name {
                    fn of<L: Lanes>(&self, $l: L, $w: &[L::V]) -> L::V {
                        $body
                    }
                }
            )*

            fn compare(with: impl Lanes, what: &str, narrow: bool) {
                let mut random = Random(9);
                for _ in 0..2000 {
                    let words = [random.words(), random.words(), random.words()];
                    $(
                        let ask = |l: &dyn Fn(Ask<'_, $name>) -> V| l(Ask { method: &$name, words: &words });
                        let here = ask(&|job| Portable.vectorise(job));
                        let there = ask(&|job| with.vectorise(job));
                        if !narrow || !FORMS_OF_ITS_OWN.contains(&stringify!($name)) {
                            assert_eq!(here, there, "{what} {}: {words:x?}", stringify!($name));
                        }
                    )*
                }
            }
        };
    }

    /// What accumulates differently where dots are narrow, or where signed weights are not raised.
    const FORMS_OF_ITS_OWN: &[&str] = &[
        "dot",
        "dot_end",
        "dot_add",
        "factor",
        "sub_scale",
        "signed_sub_scale",
        "times",
        "prepared",
        "dot_signed",
        "dot_signed_end",
        "dot_signed_scaled",
    ];

    /// Four i8.
    const ACTIVATIONS: u32 = u32::from_le_bytes([127, 0x81, 3, 0xc0]);

    const TABLE: [u32; 64] = {
        let mut table = [0; 64];
        let mut i = 0;
        while i < 64 {
            table[i] = 0x9e37_79b9u32.wrapping_mul(i as u32 + 1);
            i += 1;
        }
        table
    };

    /// A word of each sum that depends on all of its 64 bits.
    fn wide<L: Lanes>(l: L, a: Wide<L::V>) -> L::V {
        let mut sums = Sums::ZERO;
        l.store_wide(a, &mut sums);
        let mut bytes = vec![0u8; 4 * L::ROWS];
        for row in 0..L::ROWS {
            let sum = sums.row(row, L::ROWS);
            let word = (sum as u32) ^ ((sum >> 32) as u32).rotate_left(7);
            bytes[4 * row..4 * row + 4].copy_from_slice(&word.to_le_bytes());
        }
        l.load(&bytes)
    }

    /// The low halves of words as f16.
    fn halves_of<L: Lanes>(l: L, v: L::V) -> L::F {
        let mut bytes = vec![0u8; 4 * L::ROWS];
        l.store(v, &mut bytes);
        let halves: Vec<u8> = bytes
            .chunks_exact(4)
            .flat_map(|word| [word[0], word[1]])
            .collect();
        l.load_f16(&halves)
    }

    /// Activations, from the first row's word.
    fn word<L: Lanes>(l: L, v: L::V) -> u32 {
        let mut bytes = vec![0u8; 4 * L::ROWS];
        l.store(v, &mut bytes);
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) & 0x0f0f_7f7f
    }

    methods! {
        and: |l, w| l.and(w[0], w[1]);
        or: |l, w| l.or(w[0], w[1]);
        shl: |l, w| l.xor(l.xor(l.shl::<1>(w[0]), l.shl::<2>(w[1])), l.xor(l.shl::<4>(w[2]), l.shl::<7>(w[0])));
        shr: |l, w| l.xor(l.xor(l.shr::<1>(w[0]), l.shr::<2>(w[1])), l.xor(l.shr::<4>(w[2]), l.shr::<24>(w[0])));
        add: |l, w| l.add(w[0], w[1]);
        sub: |l, w| l.sub(w[0], w[1]);
        min: |l, w| l.min(w[0], w[1]);
        xor: |l, w| l.xor(w[0], w[1]);
        sub8: |l, w| l.sub8(w[0], w[1]);
        shr_by: |l, w| l.shr_by(w[0], l.shr::<26>(w[1]));
        look_up: |l, w| l.look_up(l.table(&std::array::from_fn(|i| (i * 37 + 11) as u8)), l.and(w[0], l.splat(0x0f0f_0f0f)));
        gather: |l, w| l.gather(&TABLE, w[0]);
        flip: |l, w| l.flip(w[0], w[1]);
        mul16: |l, w| l.mul16(w[0], w[1]);
        madd16: |l, w| l.madd16(w[0], w[1]);
        pair: |l, w| l.add(l.pair::<0>(w[0]), l.pair::<2>(w[0]));
        signed_pair: |l, w| l.sub(l.signed_pair::<0>(w[0]), l.signed_pair::<2>(w[0]));
        mul_add_wide: |l, w| wide(l, l.mul_add_wide(l.mul_add_wide(l.zero_wide(), w[0], w[1]), w[1], w[2]));
        mul_add_parted: |l, w| wide(l, l.mul_add_parted(l.zero_wide(), w[0], Wide { even: w[1], odd: l.odd(w[1]) }));
        mul_add_splat: |l, w| wide(l, l.mul_add_splat(l.zero_wide(), -77_777_777, Wide { even: w[0], odd: l.odd(w[0]) }));
        add_wide: |l, w| {
            let (a, b) = (l.mul_add_wide(l.zero_wide(), w[0], w[1]), l.mul_add_wide(l.zero_wide(), w[1], w[2]));
            wide(l, l.add_wide(a, b))
        };
        sub_wide: |l, w| {
            let (a, b) = (l.mul_add_wide(l.zero_wide(), w[0], w[1]), l.mul_add_wide(l.zero_wide(), w[1], w[2]));
            wide(l, l.sub_wide(a, b))
        };
        shift_wide: |l, w| wide(l, l.shift_wide(l.mul_add_wide(l.zero_wide(), w[0], w[1]), l.shr::<26>(w[2])));
        load_wide: |l, w| {
            let mut sums = Sums::ZERO;
            l.store_wide(l.mul_add_wide(l.zero_wide(), w[0], w[1]), &mut sums);
            wide(l, l.load_wide(&sums))
        };
        mul_floor: |l, w| l.mul_floor(halves_of(l, w[0]), l.pow2(l.sub(l.shr::<28>(w[1]), l.splat(8))));
        negate: |l, w| l.mul_floor(l.negate(halves_of(l, w[0])), l.pow2(l.shr::<28>(w[1])));
        // Within the bounds of narrow dots, those of every form come to the same.
        dots: |l, w| {
            let few = l.and(w[0], l.splat(0x3f3f_3f3f));
            let one = l.dot(l.splat(0), few, ACTIVATIONS);
            let sum = l.dot_add(one, l.dot(l.splat(0), l.and(w[1], few), ACTIVATIONS));
            l.sub(l.dot_end(sum, l.factor(13 | 13 << 16)), l.dot_end(sum, l.times(l.sub_scale::<2>(w[2]), 16 | 16 << 16)))
        };
        signed_dots: |l, w| {
            let sum = l.dot_signed(l.splat(0), l.prepare_signed(w[0]), ACTIVATIONS);
            let activations: i32 = ACTIVATIONS.to_le_bytes().iter().map(|q| i32::from(*q as i8)).sum();
            let scaled = l.dot_signed_scaled(sum, l.signed_sub_scale::<1>(w[2]), 16 | 16 << 16, 16 * activations);
            l.sub(l.dot_signed_end(sum, 7 | 7 << 16, 7 * activations), scaled)
        };
        loads: |l, w| {
            let mut bytes = vec![0u8; 4 * L::ROWS];
            l.store(w[0], &mut bytes);
            let low: Vec<u8> = bytes.iter().copied().step_by(4).collect();
            let halves: Vec<u8> = bytes.chunks_exact(4).flat_map(|word| [word[0], word[1]]).collect();
            l.add(l.load_u8(&low), l.shl::<3>(l.load_i16(&halves)))
        };
        rounded: |l, w| {
            let sums = l.shift_wide(l.mul_add_wide(l.zero_wide(), w[0], w[1]), l.splat(24));
            let mut y = vec![0f32; L::ROWS];
            let done = l.round(sums, l.sub(l.shr::<25>(w[2]), l.splat(64)), &mut y);
            assert!(done);
            l.load(bytemuck::cast_slice(&y))
        };
        factor: |l, w| l.factor(word(l, w[0]));
        sub_scale: |l, w| l.add(l.sub_scale::<1>(w[0]), l.sub_scale::<3>(w[0]));
        signed_sub_scale: |l, w| l.sub(l.signed_sub_scale::<0>(w[0]), l.signed_sub_scale::<2>(w[0]));
        times: |l, w| l.times(l.sub_scale::<2>(w[0]), word(l, w[1]));
        dot: |l, w| l.dot_add(l.dot(l.splat(0), w[0], word(l, w[1])), l.dot(w[2], w[1], word(l, w[0])));
        dot_end: |l, w| l.dot_end(l.dot(l.splat(0), w[0], word(l, w[1])), l.factor(13 | 13 << 16));
        dot_signed: |l, w| l.dot_signed(l.splat(0), l.prepare_signed(w[0]), word(l, w[1]));
        dot_signed_end: |l, w| l.dot_signed_end(l.dot_signed(l.splat(0), l.prepare_signed(w[0]), word(l, w[1])), 7 | 7 << 16, 12_345);
        dot_signed_scaled: |l, w| {
            let sum = l.dot_signed(l.splat(0), l.prepare_signed(w[0]), word(l, w[1]));
            l.dot_signed_scaled(sum, l.signed_sub_scale::<1>(w[2]), 16 | 16 << 16, -6_789)
        };
    }

    /// No failure in CI either, whose machines have what they have.
    fn skipped(what: &str) {
        // Past the harness, which would keep it to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no {what} to compare plain code with");
    }

    #[test]
    fn plain_code_does_what_the_instructions_do() {
        match Avx2::new() {
            Some(avx2) => compare(avx2, "AVX2", true),
            None => skipped("AVX2"),
        }
        match Avx512::new() {
            Some(avx512) => compare(avx512, "AVX-512", false),
            None => skipped("AVX-512"),
        }
    }
}
