// A quantised segment of activations in RECORD words: 64 words of four i8; u of eight blocks; u times the sum of q of
// sixteen half blocks; m_a; e_a. E_a is for whom multiplies to find.

const RECORD: u32 = 96u;
const AT_U: u32 = 64u;
const AT_SUMS: u32 = 72u;
const AT_M: u32 = 88u;
const AT_E: u32 = 89u;
