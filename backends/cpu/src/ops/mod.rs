//! The operations of `docs/numerics.md` other than the quantised product, one file a concept.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod element;
pub(crate) mod elementary;
pub(crate) mod elementwise;
pub(crate) mod float_matmul;
pub(crate) mod norm;
pub(crate) mod reduce;
pub(crate) mod rope;
pub(crate) mod router;
