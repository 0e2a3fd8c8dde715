//! E2M1 codes, doubled to be integers, under 8-bit floating-point scales: MXFP4 and NVFP4. Layouts are those of the
//! `block_mxfp4` and `block_nvfp4` structs in ggml.

use crate::codec::ScaledBlock;
use crate::scale::Scale;

/// E8M0 scale; 16 bytes of nibbles: byte `j` holds weight `j` low and weight `j + 16` high.
pub(crate) struct MXFP4;

/// Four unsigned E4M3 scales for 16 weights each; 8 bytes of nibbles for each: byte `j` holds weight `j` low and weight
/// `j + 8` high.
pub(crate) struct NVFP4;

/// E2M1 values times two. Code 8 is a zero like code 0: GGML's table has no −0.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

impl ScaledBlock<17, 32, 1> for MXFP4 {
    #[inline]
    fn scales(block: &[u8; 17]) -> [Scale; 1] {
        [Scale::from_e8m0_half(block[0])]
    }

    #[inline]
    fn codes(block: &[u8; 17], out: &mut [i8; 32]) {
        for j in 0..16 {
            out[j] = E2M1_DOUBLED[usize::from(block[1 + j] & 15)];
            out[j + 16] = E2M1_DOUBLED[usize::from(block[1 + j] >> 4)];
        }
    }
}

impl ScaledBlock<36, 64, 4> for NVFP4 {
    #[inline]
    fn scales(block: &[u8; 36]) -> [Scale; 4] {
        std::array::from_fn(|s| Scale::from_ue4m3_half(block[s]))
    }

    #[inline]
    fn codes(block: &[u8; 36], out: &mut [i8; 64]) {
        for (bytes, out) in block[4..]
            .as_chunks::<8>()
            .0
            .iter()
            .zip(out.as_chunks_mut::<16>().0)
        {
            for j in 0..8 {
                out[j] = E2M1_DOUBLED[usize::from(bytes[j] & 15)];
                out[j + 8] = E2M1_DOUBLED[usize::from(bytes[j] >> 4)];
            }
        }
    }
}
